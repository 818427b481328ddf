"""The order of the floors: imports go down, and the ground floors touch nothing outside."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlora

PACKAGE = Path(jaxlora.__file__).parent
FLOORS = {
    "errors": 0, "plain": 0, "trees": 0, "lora": 0, "pcgrad": 0, "losses": 0, "metrics": 0,
    "align": 0, "combine": 0, "ops": 0,
    "bert": 1, "heads": 1,
    "tasks": 2, "variants": 2, "storage": 2, "step": 2,
}  # fmt: skip
TOP = 3
OUTSIDE = {
    "os", "io", "pathlib", "json", "shutil", "tempfile", "urllib", "subprocess", "sys",
    "tensorflow_datasets", "orbax", "transformers", "tokenizers", "safetensors",
    "huggingface_hub", "rich", "tyro", "matplotlib", "grain", "tensorboardX",
}  # fmt: skip

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(["jaxlora", *p.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): p
    for p in FILES
}


def imports(path):
    """Every import of a file, also inside functions; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module):
    return FLOORS.get(module.removeprefix("jaxlora."), TOP)


def own(path):
    """The package's modules that a file imports (the package itself only gives access)."""
    return {name for name in imports(path) if name in MODULES and name != "jaxlora"}


def test_every_floor_has_its_modules():
    assert {f"jaxlora.{name}" for name in FLOORS} <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    above = {name for name in own(MODULES[module]) if floor(name) > floor(module)}
    assert not above, f"{module} is on floor {floor(module)}"


@pytest.mark.parametrize("module", [f"jaxlora.{name}" for name in FLOORS])
def test_lower_floors_touch_nothing_outside(module):
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & OUTSIDE


def test_the_order_has_no_cycle():
    waiting = {name: own(path) - {name} for name, path in MODULES.items()}
    while ready := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        for name in ready:
            del waiting[name]
    assert not waiting


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
