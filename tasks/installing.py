"""How this package was installed, and so the command that brings one of its extras here."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "rewardq"

_EXTRA_MARKER = re.compile(r"""extra\s*==\s*["']([\w.-]+)["']""")


def install_command(extra: str) -> str:
    """A command to paste that installs what `rewardq[extra]` needs, into the environment of this interpreter."""
    return f"{_installer()} {' '.join(map(shlex.quote, _what_to_install(extra)))}"


def _installer() -> str:
    """`pip install` of this interpreter: a `pip` on the PATH may be another environment's. One of uv's has no pip."""
    python = shlex.quote(sys.executable or "python")
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"


def _what_to_install(extra: str) -> list[str]:
    """What pip is told: this package with the extra, from where it came; its parts where that is gone."""
    for installed in distributions(name=NAME):
        noted = installed.read_text("direct_url.json")
        if noted:
            from_origin = _of_origin(json.loads(noted), extra)
            return from_origin or _requirements(installed, extra)
    checkout = Path(__file__).resolve().parents[1]  # on PYTHONPATH, without an install
    return _of_folder(checkout, extra, is_editable=True) or [f"{NAME}[{extra}]"]


def _of_origin(origin: dict[str, Any], extra: str) -> list[str]:
    """By what pip has noted (PEP 610): a folder, a file, an archive, a repository; nothing if that is gone."""
    url = origin["url"]
    if "vcs_info" in origin:
        if url.startswith("file:"):  # pip before 24 takes no `name @ git+file:///...`
            return []
        vcs = origin["vcs_info"]
        folder = ""
        if "subdirectory" in origin:
            folder = f"#subdirectory={origin['subdirectory']}"
        return [f"{NAME}[{extra}] @ {vcs['vcs']}+{url}@{vcs['commit_id']}{folder}"]
    if not url.startswith("file:"):
        return [f"{NAME}[{extra}] @ {url}"]
    path = Path(unquote(urlsplit(url).path))
    if "dir_info" in origin:
        is_editable = bool(origin["dir_info"].get("editable"))
        return _of_folder(path, extra, is_editable=is_editable)
    return [f"{path}[{extra}]"] if path.is_file() else []


def _of_folder(folder: Path, extra: str, *, is_editable: bool) -> list[str]:
    if not (folder / "pyproject.toml").is_file():
        return []
    return [*(["-e"] if is_editable else []), f"{folder}[{extra}]"]


def _requirements(installed: Distribution, extra: str) -> list[str]:
    """The packages that an extra brings, also through other extras that it names."""
    found: list[str] = []
    left, seen = [extra], set()
    while left:
        wanted = left.pop()
        seen.add(wanted)
        for requirement in _requirements_of_one(installed, wanted):
            own = re.match(rf"{NAME}\[([^\]]+)\]", requirement.replace(" ", ""))
            if own is None:
                found.append(requirement)
            else:
                left += [name for name in own[1].split(",") if name not in seen]
    return list(dict.fromkeys(found)) or [f"{NAME}[{extra}]"]


def _requirements_of_one(installed: Distribution, extra: str) -> Iterator[str]:
    """The requirements that an extra itself has: packages, and other extras of ours."""
    for line in installed.requires or []:
        requirement, _, marker = line.partition(";")
        named = _EXTRA_MARKER.search(marker)
        if named is not None and named[1] == extra:
            yield requirement.strip()
