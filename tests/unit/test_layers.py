"""Imports run downhill: a module imports from lower layers, and the packages of layer 1 not one another.

Imports inside functions and under TYPE_CHECKING count too: what is known is known. A new module is put into
the table below, where it belongs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mtl_dist

PACKAGE = Path(mtl_dist.__file__).parent

LAYERS: dict[int, str] = {
    0: "errors specs batch plural durable json_files lazy randomness status heartbeat printable fonts "
    "cell_table processes tensor_files not_finite config kinds",
    1: "tasks models balance data",
    2: "importers engine gradients checkpoint optim user_optimizer ema batch_statistics monitor "
    "tracking figures stopping",
    3: "step balancing skipping hangs",
    4: "training evaluator sample_rows intervals",
    5: "recipe recipe_tasks resuming shipped run_folder results assemble caveats runs debug prediction",
    6: "launch report exporting serving face prepare",
    7: "cli commands __main__",
}
LAYER = {room: number for number, rooms in LAYERS.items() for room in rooms.split()}
INDEPENDENT = LAYERS[1].split()


def imports_of(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, dotted, without the package's own name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from mtl_dist import checkpoint` names a module by what it imports.
            at_top = node.module == "mtl_dist"
            names = [f"mtl_dist.{alias.name}" for alias in node.names] if at_top else [node.module or ""]
        else:
            continue
        yield from (name.removeprefix("mtl_dist.") for name in names if name.startswith("mtl_dist."))


def modules() -> dict[str, set[str]]:
    """Every module of the package and what it imports of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = set(imports_of(path)) - {"__version__"}
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_its_layer() -> None:
    assert sorted({room(module) for module in MODULES} - set(LAYER)) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_downhill(module: str) -> None:
    here = LAYER[room(module)]
    assert [other for other in sorted(MODULES[module]) if LAYER[room(other)] > here] == []


@pytest.mark.parametrize("package", INDEPENDENT)
def test_the_packages_of_layer_1_do_not_know_one_another(package: str) -> None:
    known = {
        f"{module} imports {other}"
        for module, others in MODULES.items()
        for other in others
        if room(module) == package and room(other) in INDEPENDENT and room(other) != package
    }
    assert known == set()


def test_rooms_of_one_layer_and_modules_of_one_package_do_not_import_in_circles() -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in MODULES.items():
        rooms.setdefault(room(module), set()).update(
            room(other) for other in others if room(other) != room(module)
        )
    for graph in (rooms, MODULES):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" -> ".join(error.args[1]))


def test_importing_the_package_imports_none_of_its_modules() -> None:
    """Only its functions may, when they are called: `import mtl_dist` and `mtl --help` stay quick."""
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    imported = [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    assert [name for name in imported if name.startswith("mtl_dist")] == []


def test_nothing_is_explained_twice() -> None:
    """Of two strings below a field the reference of settings shows one."""
    twice = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            body = getattr(node, "body", None)
            strings = [_is_string(each) for each in body] if isinstance(body, list) else []
            twice += [
                f"{path}:{body[i].lineno}" for i in range(1, len(strings)) if all(strings[i - 1 : i + 1])
            ]
    assert twice == []


def _is_string(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def test_nobody_outside_the_engines_names_a_stage_of_zero() -> None:
    """Whoever works differently with one engine than with another asks for a capability."""
    stage = re.compile(r"zero_stage|ZeRO \d", re.IGNORECASE)
    naming = {
        name
        for path in PACKAGE.rglob("*.py")
        if (name := path.relative_to(PACKAGE).as_posix()).split("/")[0] != "engine"
        and stage.search(path.read_text(encoding="utf-8"))
    }
    assert naming == set()
