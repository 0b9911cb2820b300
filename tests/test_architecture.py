"""docs/architecture.md is true: its files and names exist, its rooms stand as drawn, nothing in the code is missing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tasks.settings import PREFIX, Settings
from tests.servers import ROOT
from trainer_client.engine.actions import Lane
from trainer_client.engine.states import TRANSITIONS, State

PACKAGES = ("tasks", "workers", "trainer_client", "rewardq")

PAGE = (ROOT / "docs" / "architecture.md").read_text()

ENDED = {State.ANSWERED, State.GIVEN_UP}
"""States that may follow every other state. The page says so in words, and need not draw these transitions."""

FILE_COLUMNS, NAME_COLUMNS = {"file", "where"}, {"name", "type", "lock", "queue or lock"}
"""Columns of tables: a file, and the names in it."""

LOCKS = {"Lock", "RLock", "Condition"}


def in_backticks(text: str) -> list[str]:
    """What a text has in backticks, in order."""
    return re.findall(r"`([^`]+)`", text)


def is_path(text: str) -> bool:
    """Whether it is written as a path of a file or a folder of the repository."""
    return re.fullmatch(r"[\w./-]+", text) is not None and ("/" in text or text.endswith((".md", ".toml", ".py")))


def prose_and_tables() -> list[str]:
    """The lines of the page outside fenced blocks; an item of a list is one line, though it is wrapped."""
    lines: list[str] = []
    is_fenced = False
    for line in PAGE.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced:
            continue
        elif line.startswith("   ") and lines:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return lines


def fenced(first: str) -> list[list[str]]:
    """The lines of each fenced block that contains `first`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return [block.splitlines() for block in blocks if first in block]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def targets_of(node: ast.AST) -> Iterator[str]:
    """Names, or attributes of `self`, that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for one in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(one, ast.Name):
                yield one.id
            elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "self":
                yield one.attr


@cache
def names_in(path: Path) -> frozenset[str]:
    """The names that a file defines: functions, classes, constants, and `Class.attribute`."""
    found = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for name in names_in_class(node)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            found |= set(targets_of(node))
    return frozenset(found)


def names_in_class(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner.name
        elif isinstance(inner, ast.Assign | ast.AnnAssign):
            yield from targets_of(inner)


@cache
def all_files() -> tuple[Path, ...]:
    return tuple(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))


@cache
def all_names() -> frozenset[str]:
    """Every name that a file of the packages defines; of an attribute also `Class.attribute`."""
    return frozenset(name for path in all_files() for name in names_in(path))


def test_every_file_and_folder_exists():
    paths = {text for line in prose_and_tables() for text in in_backticks(line) if is_path(text)}
    assert len(paths) > 80
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_name_beside_a_file_is_defined_there():
    wrong, num_checked = [], 0
    for path, name in names_beside_files():
        num_checked += 1
        if name not in names_in(ROOT / path):
            wrong.append(f"{path}: {name}")
    assert num_checked > 200
    assert wrong == []


def names_beside_files() -> Iterator[tuple[str, str]]:
    for row in rows_of_tables():
        paths = [in_backticks(row[column])[0] for column in FILE_COLUMNS & row.keys() if ".py`" in row[column]]
        names = [name for column in NAME_COLUMNS & row.keys() for name in in_backticks(row[column])]
        yield from ((path, name) for path in paths for name in names)
    for line in prose_and_tables():
        yield from names_after_files(line)


def rows_of_tables() -> Iterator[dict[str, str]]:
    """Each row of each table, its cells by the words above their column."""
    columns: list[str] = []
    for line in prose_and_tables():
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not columns:
            columns = cells
        elif not set(line) <= set("|- "):
            yield dict(zip(columns, cells, strict=True))


def names_after_files(line: str) -> Iterator[tuple[str, str]]:
    """`path`: `Name`, `Name`: the names up to the end of the clause belong to the file."""
    for path, names in re.findall(r"`([\w./]+\.py)`: ((?:`[\w.]+`(?:, | and | or |, and the table )?)+)", line):
        yield from ((path, name) for name in in_backticks(names))


def test_every_type_and_constant_that_the_page_speaks_of_exists():
    written = {text for line in prose_and_tables() for text in in_backticks(line) if not is_path(text)}
    spoken_of = {text for text in written if re.fullmatch(r"_?[A-Z]\w+(\.\w+)?", text)}
    spoken_of -= {text for text in spoken_of if text.startswith(PREFIX)}
    known = all_names() | {state.name for state in State} | TEST_NAMES
    assert len(spoken_of) > 100
    assert sorted(spoken_of - known) == []


TEST_NAMES = frozenset(name for path in (ROOT / "tests").rglob("*.py") for name in names_in(path))


def test_every_setting_that_the_page_speaks_of_exists():
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert sorted(set(re.findall(r"REWARDQ_[A-Z_]+[A-Z]", PAGE)) - known) == []


# --- rooms ---------------------------------------------------------------------------------------


def drawing_of(package: str) -> list[list[str]]:
    """The lines of a package's drawing from the top, each the rooms and files on it."""
    first = {"tasks": "celery_app  ", "workers": "process/  ", "trainer_client": "cli/  "}[package]
    (block,) = fenced(first)
    return [[name.rstrip("/") for name in re.split(r"  +", line[:55].strip())] for line in block]


def rooms_and_files(package: str) -> set[str]:
    folder = ROOT / package
    rooms = {path.parent.name for path in folder.glob("*/__init__.py")}
    return rooms | {path.stem for path in folder.glob("*.py")} - {"__init__"}


def imports_in(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, for types too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ["tasks", "workers", "trainer_client"])
def test_every_room_and_file_is_drawn(package):
    drawn = [name for line in drawing_of(package) for name in line]
    assert sorted(drawn) == sorted(rooms_and_files(package))


@pytest.mark.parametrize("package", ["tasks", "workers", "trainer_client"])
def test_a_room_imports_only_what_is_drawn_below_it(package):
    lines = drawing_of(package)
    floor_of = {name: -number for number, line in enumerate(lines) for name in line}
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for imported in imports_in(path):
            top, _, rest = imported.partition(".")
            name = rest.partition(".")[0]
            if top == package and name in floor_of and name != own and floor_of[name] >= floor_of[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert wrong == []


# --- states --------------------------------------------------------------------------------------


def test_the_diagram_has_the_transitions_of_the_code():
    (diagram,) = fenced("stateDiagram-v2")
    drawn = set(re.findall(r"^ +(\S+) --> (\w+|\[\*\])", "\n".join(diagram), re.MULTILINE))
    drawn = {(before, after) for before, after in drawn if after != "[*]"}
    allowed = {
        ("[*]" if before is None else before.name, after.name) for before, some in TRANSITIONS.items() for after in some
    }
    ended = {state.name for state in ENDED}
    assert sorted(drawn - allowed) == []
    assert sorted((before, after) for before, after in allowed - drawn if after not in ended) == []


def test_every_state_has_a_row():
    rows = re.findall(r"^\| `([A-Z_]+)` \|", PAGE, re.MULTILINE)
    assert rows == [state.name for state in State]


# --- threads and locks ---------------------------------------------------------------------------


def threads_started() -> set[str]:
    """Names of the threads that the packages start."""
    found = {f"rewardq-{lane.value}" for lane in Lane}
    for path in all_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and makes_a_thread(node):
                found |= {text for text in texts_in(node) if re.fullmatch(r"[a-z_-]+", text)}
    return found


def makes_a_thread(call: ast.Call) -> bool:
    """A call of `Thread`, of a constructor above that names the thread, or of a NetworkLoop's."""
    text = ast.unparse(call.func)
    return text == "threading.Thread" or (text == "super().__init__" and "rewardq-" in ast.unparse(call))


def texts_in(call: ast.Call) -> Iterator[str]:
    for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def test_every_thread_that_the_code_starts_is_on_the_page():
    started = threads_started()
    assert len(started) > 12
    named = {text for line in prose_and_tables() if line.startswith("|") for text in in_backticks(line)}
    assert sorted(started - named) == []


def test_every_thread_on_the_page_is_started():
    named = set(re.findall(r"`(rewardq-[a-z-]+)`", PAGE))
    assert sorted(named - threads_started()) == []


def locks_made() -> set[tuple[str, str]]:
    """File and name of each lock that the packages make."""
    found = set()
    for path in all_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Assign | ast.AnnAssign) and makes_a_lock(node.value):
                found |= {(str(path.relative_to(ROOT)), name) for name in targets_of(node)}
    return found


def makes_a_lock(value: ast.expr | None) -> bool:
    """Whether an assigned value is a lock of threading's or asyncio's, or a field that makes one."""
    if not isinstance(value, ast.Call):
        return False
    called = [value.func, *(keyword.value for keyword in value.keywords if keyword.arg == "default_factory")]
    return any(isinstance(one, ast.Attribute) and one.attr in LOCKS for one in called)


def test_every_lock_of_the_code_is_on_the_page():
    rows = [line for line in prose_and_tables() if line.startswith("|")]
    missing = []
    for file, name in sorted(locks_made()):
        own = [row for row in rows if f"`{file}`" in row]
        if not any(text.rpartition(".")[2] == name for row in own for text in in_backticks(row)):
            missing.append(f"{file}: {name}")
    assert len(locks_made()) > 25
    assert missing == []


def test_there_are_answers_to_many_questions():
    assert len(re.findall(r"^\| [^|]+\? ?[^|]*\| `", PAGE, re.MULTILINE)) >= 45
