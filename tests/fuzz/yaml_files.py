"""Rewards files: valid ones that were changed by chance, and bombs. Each gives a config, or an error that says where.

The loader may neither raise anything else, nor take longer than `MOST_S`, nor more memory than `MOST_MB`.
"""

from __future__ import annotations

import logging
import random
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks.errors import ConfigError
from tasks.rewards import RewardConfig
from tests.fuzz.counts import Counts, keep

MOST_S = 30.0
"""Seconds of a CPU that a file may take."""

MOST_MB = 400.0

ADDRESS_SPACE_MB = 3072
"""A bomb that goes off gets `MemoryError` instead of the machine's memory."""

VALID = (
    """\
rewards:
  - reward_model: pairwise_judge
    rubric_file: rubric.txt
    api_base_url: http://a:1/v1
    vlm_model: judge
""",
    """\
rewards:
  - name: text
    reward_model: OCR
    weight: 0.5
    batch_size: 8
  - name: looks_good
    reward_model: vllm_evaluate
    api_base_url: http://127.0.0.1:8000/v1
    vlm_model: judge
    timeout_s: 30
    on_failure: nan
eval_rewards:
  reward_model: PickScore
  extra_kwargs: {}
train:
  advantage_aggregation: gdpo
  global_std: true
""",
    """\
base: &base
  weight: 1e-1
  batch_size: 4
  on_failure: {value: 0.0}
rewards:
  - <<: *base
    name: own
    reward_model: my_rewards.Mine
    version: 1.10
    required_fields: [prompt, image]
    extra_kwargs: {size: 3, words: [a, b, 'on'], nested: {x: null, y: -1.5e3}}
  - {<<: *base, reward_model: jpeg_compressibility_Rank, name: rank, queue: other}
model: {name: flux, seeds: [1, 2, 3]}
""",
    """\
%YAML 1.1
---
rewards: {reward_model: vlm_rubric, api_base_url: [http://a:1/v1, http://b:2/v1], rubric: "a: b\\n# c",
  api_key_env: REWARDQ_KEY_A, temperature: 0.5, cache: yes}
eval_rewards:
- reward_model: a_forks_own
  x: |
    several
    lines
- {reward_model: "RemotePointwiseRewardModel", server_url: http://127.0.0.1:9, name: 'remote'}
""",
)

SCALARS = (
    "", "~", "null", "true", "no", "on", ".nan", ".inf", "-.inf", "0", "-1", "1e400", "1e-400", "010", "0o10", "1:30",
    "0x" + "f" * 90, "9" * 99, "9" * 5000, "0x" + "f" * 20000, "0b" + "1" * 20000, "1" + ":59" * 3000,
    "1e" + "9" * 90, "-0", "+", "-", ".", "._", "0x", "0b", "_", "1_", "=", "<<", "2026-13-41", "0000-00-00",
    "2001-12-14t21:59:43.10+99:99", "9999-12-31 23:59:59.9 -23:59", "!!int ''", "!!int '_'", "!!int 'x'",
    "!!float ''", "!!bool x", "!!null x", "!!timestamp x", "!!binary '='", "!!binary aGVsbG8=", "!!set {a, b}",
    "!!omap [a: 1]", "!!pairs [a: 1, a: 2]", "!!omap x", "!!str [a]", "!!map [a]", "!!seq {a: b}",
    "!!python/object/apply:os.system [true]", "!!python/name:os.system", "!mine x", "!<tag:x> y", "!!merge <<",
    "*nobody", "&a", "&a *a", "&a [*a]", "&a {x: *a}", "&a {<<: *a}", "&a {? *a : 1}", "{<<: [1]}", "{<<: x}",
    "{<<: {a: 1}}", "{? [a] : b}", "{? {a: b} : c}", "{1: a, 1.0: b, true: c}", "{[]: 1}", "[[[[[[]]]]]]",
    "{a: {b: {c: {d: {}}}}}", "'\\0'", '"\\0"', '"\\uD800"', '"\\x7f"', '"\\U0010FFFF"', "'*'", '"**"',
    "\N{ZERO WIDTH SPACE}", "\N{RIGHT-TO-LEFT OVERRIDE}x", "é", "a" * 70000, "a.b", "a..b", ".a", "a.", "a.b.c.d.e",
    "os.path", "json.JSONDecoder", "tests.reward_models.PixelCode", "/etc/passwd.X", "..\\x.Y", "a/b.C", '"a\\0b.C"',
    "'**.C'", "'[a.C'", "1.2", "__main__.X", "this.C", "antigravity.X", "/dev/zero", "/dev/null", "/", "~root/x",
    "${HOME}", "http://u:p@h/", "http://[", "redis://", "prompt", "[prompt]", "[image, image]", "[nobody]", "gpu",
    "a b", "q" * 65,
)  # fmt: skip

KEYS = (
    "name", "reward_model", "weight", "dtype", "device", "batch_size", "async_reward", "num_workers", "queue",
    "version", "on_failure", "timeout_s", "cache", "image_format", "kind", "required_fields", "extra_kwargs",
    "rewards", "train", "eval_rewards", "applicable_datasets", "rubric", "rubric_file", "api_base_url", "vlm_model",
    "api_key", "api_key_env", "server_url", "temperature", "options", "advantage_aggregation", "global_std", "<<",
    "?", "~", "1", "[a]", "'0'", "wieght", "ties", "questions", "k" * 900, "? " + "k" * 3000,
)  # fmt: skip

BYTES = (
    b"",
    b"*a",
    b"&a ",
    b"!!int ",
    b"{",
    b"[",
    b"]",
    b"}",
    b"'",
    b'"',
    b"\n",
    b"\0",
    b"\xff",
    b"\r",
    b"\t",
    b"<<: ",
)

WHOLE_FILE = re.compile(
    r"no rewards: block|needs a mapping with a rewards: block|has more than \d+ bytes|the block .* has rewards in it"
)
"""Errors that are about no line."""


def run(seconds: float) -> Counts:
    """Try files for so long; the seed is printed."""
    seed = random.randrange(2**32)
    print(f"yaml_files: seed {seed}", flush=True)
    rng = random.Random(seed)
    counts = Counts()
    ends = time.monotonic() + seconds
    with _bounded():
        while time.monotonic() < ends:
            _try(_file(rng), counts)
    return counts


def replay(files: Sequence[Path]) -> Counts:
    """Try files again."""
    counts = Counts()
    with _bounded():
        for file in files:
            _try(file.read_bytes(), counts)
    return counts


# --- what is tried -------------------------------------------------------------------------------


def _file(rng: random.Random) -> bytes:
    make = rng.choices((_changed_text, _changed_bytes, _bomb), (6, 2, 1))[0]
    return make(rng)


def _changed_text(rng: random.Random) -> bytes:
    lines = rng.choice(VALID).splitlines()
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        change = rng.choice((_other_value, _other_value, _other_key, _other_place, _other_indent, _twice, _without))
        change(rng, lines)
        lines = lines or ["rewards:"]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _other_value(rng: random.Random, lines: list[str]) -> None:
    i = rng.randrange(len(lines))
    key, colon, _ = lines[i].partition(":")
    lines[i] = f"{key}{colon or ':'} {rng.choice(SCALARS)}"


def _other_key(rng: random.Random, lines: list[str]) -> None:
    i = rng.randrange(len(lines))
    indent = re.match(r"[ -]*", lines[i])
    lines.insert(i + 1, f"{' ' * len(indent[0] if indent else '')}{rng.choice(KEYS)}: {rng.choice(SCALARS)}")


def _other_place(rng: random.Random, lines: list[str]) -> None:
    lines.insert(rng.randrange(len(lines)), lines.pop(rng.randrange(len(lines))))


def _other_indent(rng: random.Random, lines: list[str]) -> None:
    i = rng.randrange(len(lines))
    lines[i] = rng.choice((" ", "  ", "\t", "- ", "? ", ": ", "# ", "--- ", "... ")) + lines[i]


def _twice(rng: random.Random, lines: list[str]) -> None:
    i = rng.randrange(len(lines))
    lines.insert(i, lines[i])


def _without(rng: random.Random, lines: list[str]) -> None:
    del lines[rng.randrange(len(lines))]


def _changed_bytes(rng: random.Random) -> bytes:
    data = bytearray(rng.choice(VALID).encode())
    for _ in range(rng.choice((1, 2, 5, 20))):
        i = rng.randrange(len(data))
        what = rng.random()
        if what < 0.5:
            data[i] = rng.randrange(256)
        elif what < 0.8:
            data[i : i + 1] = rng.choice(
                (b"", b"*a", b"&a ", b"!!int ", b"{", b"[", b"]", b"}", b"'", b'"', b"\n", b"\0")
            )
        else:
            del data[i : i + rng.randrange(40)]
        data = data or bytearray(b"x")
    return bytes(data)


def _bomb(rng: random.Random) -> bytes:
    make: Callable[[random.Random], str] = rng.choice((_aliases, _merges, _chain, _nesting, _many, _long))
    text = make(rng)
    place = rng.choice(("rewards: {{reward_model: my.Own, x: *z}}", "other: *z\nrewards: {{reward_model: OCR}}"))
    placed = place.replace("{{", "{").replace("}}", "}")
    return f"{text}\n{placed}\n".encode()


def _aliases(rng: random.Random) -> str:
    fan, depth = rng.choice(((10, 9), (2, 40), (100, 5), (3, 12)))
    rows = ["a0: &a0 [x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * fan)}]" for i in range(1, depth)]
    return "\n".join([*rows, f"z: &z *a{depth - 1}" if rng.random() < 0.2 else f"z: &z [*a{depth - 1}]"])


def _merges(rng: random.Random) -> str:
    fan, depth = rng.choice(((10, 9), (2, 40), (3, 12)))
    rows = ["a0: &a0 {x: 1}"]
    rows += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * fan)}], k{i}: 1}}" for i in range(1, depth)]
    return "\n".join([*rows, f"z: &z {{<<: *a{depth - 1}}}"])


def _chain(rng: random.Random) -> str:
    depth = rng.choice((30, 200, 5000))
    kind = rng.choice(("[{}]", "{{k: {}}}", "{{<<: {}}}"))
    rows = ["a0: &a0 {x: 1}"]
    rows += [f"a{i}: &a{i} {kind.format(f'*a{i - 1}')}" for i in range(1, depth)]
    return "\n".join([*rows, f"z: &z [*a{depth - 1}]"])


def _nesting(rng: random.Random) -> str:
    depth = rng.choice((20, 70, 900, 20_000))
    opened, closed = rng.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("{? [", "]: 1}")))
    return f"z: &z\n  {opened * depth}x{closed * depth if rng.random() < 0.7 else ''}"


def _many(rng: random.Random) -> str:
    num = rng.choice((100, 2000, 20_000))
    what = rng.choice(("[{}]", "{{{}}}", "{{? {} }}"))
    return f"z: &z {what.format(', '.join(f'k{i}' for i in range(num)))}\n" + rng.choice(
        ("", "eval_rewards: [" + "{reward_model: OCR}, " * num + "]")
    )


def _long(rng: random.Random) -> str:
    size = rng.choice((5000, 200_000, 2_000_000))
    return f"z: &z {rng.choice(('a', '9', '1:', '0x', '-', '# ', '&', ' ', '!'))}" + rng.choice("a9:1 ") * size


# --- what is looked at ---------------------------------------------------------------------------


class _LateError(BaseException):
    """The loader took too long; no `except Exception` may catch it."""


def _try(data: bytes, counts: Counts) -> None:
    counts.tried += 1
    before_MB, started = _peak_MB(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rewards.yaml"
        path.write_bytes(data)
        try:
            signal.setitimer(signal.ITIMER_PROF, MOST_S)
            _load(path)
        except ConfigError as error:
            counts.refused += 1
            wrong = _what_is_wrong_with(str(error), path)
        except _LateError:
            counts.stuck += 1
            return _tell(data, counts, f"took more than {MOST_S:g} s of a CPU")
        except BaseException as error:  # whatever the loader raises is looked for here
            wrong = f"raised {type(error).__name__}: {error!s:.300}"
        else:
            wrong = ""
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    more_MB = _peak_MB() - before_MB
    if more_MB > MOST_MB:
        wrong = wrong or f"took {more_MB:.0f} MB in {time.monotonic() - started:.1f} s"
    if wrong:
        counts.wrong += 1
        _tell(data, counts, wrong)
    return None


def _load(path: Path) -> None:
    """As a client does it at its start."""
    config = RewardConfig.from_yaml(path).for_launch("a")
    for spec in (*config.rewards, *config.eval_rewards):
        assert len(spec.fingerprint) == 16
        spec.call  # noqa: B018  (made here, sent by the client)


def _what_is_wrong_with(words: str, path: Path) -> str:
    if words.count(str(path)) != 1:
        return f"an error names the file {words.count(str(path))} times: {words:.300}"
    if not re.search(r"line \d+", words) and not WHOLE_FILE.search(words):
        return f"an error without a line: {words:.300}"
    if len(words) > 4000:
        return f"an error of {len(words)} characters: {words:.300}"
    return ""


def _tell(data: bytes, counts: Counts, words: str) -> None:
    kept = keep("yaml_files", data, ".yaml")
    counts.say(f"{kept.name}: {words}")


@contextmanager
def _bounded() -> Iterator[None]:
    def late(*_: object) -> None:
        raise _LateError

    _, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_MB << 20, hard))
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, handler)


def _peak_MB() -> float:  # noqa: N802
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
