"""The rooms of `workers/` and what each may import of the others: arrows point down, so that there is no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import workers

ROOMS_BELOW = {
    "process": {"scoring", "loading"},
    "scoring": {"loading"},
    "loading": set(),
    "models": {"loading"},
    "remote": {"judges", "network"},
    "judges": {"network"},
    "network": set(),
}
"""Each room, above the rooms that it imports. All import the files beside them: base, deadline, texts."""

FILES_BELOW = {
    "base": {"deadline"},
    "deadline": set(),
    "health": set(),
    "server": set(),
    "telemetry": set(),
    "texts": set(),
}
"""The files beside the rooms. They import no room."""

FOLDER = Path(workers.__file__).parent


def imported_by(path: Path) -> set[str]:
    """The rooms and files of `workers/` that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module == "workers":
            found |= {alias.name for alias in node.names}
        elif node.module.startswith("workers."):
            found.add(node.module.split(".")[1])
    return found


def test_every_room_and_file_is_known():
    rooms = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert (rooms, files) == (set(ROOMS_BELOW), set(FILES_BELOW))


def test_rooms_import_only_rooms_below_them():
    wrong = []
    for room, below in ROOMS_BELOW.items():
        allowed = {room, *below, *FILES_BELOW}
        for path in (FOLDER / room).glob("*.py"):
            wrong += [f"{path.relative_to(FOLDER)} imports {name}" for name in imported_by(path) - allowed]
    for file, below in FILES_BELOW.items():
        path = FOLDER / f"{file}.py"
        wrong += [f"{path.name} imports {name}" for name in imported_by(path) - below]
    assert not wrong


def test_no_room_is_below_itself():
    left = {room: set(below) for room, below in ROOMS_BELOW.items()}
    while left:
        lowest = {room for room, below in left.items() if not below & left.keys()}
        assert lowest, f"a circle: {left}"
        left = {room: below for room, below in left.items() if room not in lowest}
