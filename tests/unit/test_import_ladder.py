"""Imports go down only: the ladder that docs/internals/architecture.md draws."""

import ast
from pathlib import Path

import devmapper.units

PACKAGE = Path(devmapper.units.__file__).parent

# A module may import from its own rung and from those to the right of it in this table.
ALLOWED: dict[str, set[str]] = {
    "server": {
        "graph",
        "driver",
        "snapshots",
        "deviceset",
        "layerdiff",
        "engine",
        "linux",
        "thin",
        "units",
        "errors",
    },
    "cli": {
        "server",
        "graph",
        "driver",
        "snapshots",
        "deviceset",
        "layerdiff",
        "engine",
        "linux",
        "thin",
        "units",
        "errors",
    },
    "graph": {
        "driver",
        "snapshots",
        "deviceset",
        "layerdiff",
        "engine",
        "linux",
        "thin",
        "units",
        "errors",
    },
    "driver": {"deviceset", "layerdiff", "engine", "linux", "thin", "units", "errors"},
    "snapshots": {"deviceset", "engine", "linux", "thin", "units", "errors"},
    "deviceset": {"engine", "linux", "thin", "units", "errors"},
    "layerdiff": {"linux", "units", "errors"},
    "engine": {"linux", "thin", "units", "errors"},
    "linux": {"units", "errors"},
    "thin": {"linux", "units", "errors"},
    "units": {"errors"},
    "errors": set(),
}


def rung(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {rung(name) for name in found if name.startswith("devmapper.")}


def test_imports_go_down_only():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        above = imported(path) - ALLOWED[own] - {own, ""}
        wrong += [f"{relative} imports {name}" for name in sorted(above)]
    assert wrong == []


def test_engine_knows_the_port_not_its_users():
    port = imported(PACKAGE / "engine" / "port.py")
    assert port <= {"units", "errors"}


def test_no_module_is_large():
    sizes = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: lines for name, lines in sizes.items() if lines > 600} == {}


def test_numbers_of_the_format_stand_in_format_only():
    numbers = {"160774", "121107", "240779", "160478", "27022010"}
    found = [
        f"{path.relative_to(PACKAGE)}: {number}"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "thin" / "format.py"
        for number in numbers
        if number in path.read_text()
    ]
    assert found == []
