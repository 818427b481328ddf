"""The order of the rooms: each folder imports only from folders below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from syntax import parse

import jaxlora

PACKAGE = Path(jaxlora.__file__).parent
README = PACKAGE.parent / "README.md"
# From the top down. Rooms on one line do not import one another.
ROOMS = (
    ("cli",),
    ("training",),
    ("serving",),
    ("data",),
    ("tasks", "formats"),
    ("nn",),
    ("pcgrad", "lora"),
    ("aggregation",),
    ("utils",),
)
FLOOR = {room: floor for floor, rooms in enumerate(reversed(ROOMS)) for room in rooms}
# What a room must not import at all, besides rooms above it.
FORBIDDEN = {
    "training": {"tyro", "rich", "matplotlib"},
    "serving": {"tyro", "rich", "matplotlib", "grain"},
    "nn": {"os", "pathlib", "json", "transformers", "tokenizers", "safetensors", "orbax"},
    "tasks": {"os", "pathlib", "json", "transformers", "tokenizers", "safetensors", "orbax"},
    "aggregation": {"os", "pathlib", "json", "flax", "orbax"},
    "lora": {"os", "pathlib", "json", "orbax"},
    "pcgrad": {"os", "pathlib", "json", "flax", "orbax"},
}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in FLOOR
)


def imports(path):
    """Yield every module that a file imports, also inside functions."""
    for node in ast.walk(parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def rooms_imported(path):
    """Return the rooms that a file imports; `jaxlora` itself only gives access to others."""
    dotted = [name.split(".") for name in imports(path)]
    return {
        parts[1]
        for parts in dotted
        if parts[0] == "jaxlora" and len(parts) > 1 and parts[1] in FLOOR
    }


def test_every_folder_is_a_room():
    folders = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert folders | modules == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    mine = room_of(path)
    allowed = {room for room, floor in FLOOR.items() if floor < FLOOR[mine]} | {mine}
    assert rooms_imported(path) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_leave_alone_what_is_not_theirs(path):
    outside = {name.split(".")[0] for name in imports(path)}
    assert not outside & FORBIDDEN.get(room_of(path), set())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_the_experiments(path):
    assert "experiments" not in {name.split(".")[0] for name in imports(path)}


def test_the_readme_shows_the_same_order():
    text = README.read_text(encoding="utf-8")
    order = " → ".join(" | ".join(room for room in rooms) for rooms in ROOMS)
    assert f"`{order}`" in text


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "peft", "torchjd"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import jaxlora, jaxlora.training.run, jaxlora.cli.console
jaxlora.pcgrad(num_tasks=3)
"""


def test_works_without_the_oracles():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
