"""Nothing is decided by the text of an error: not its language, not its wording (moby's D10)."""

import ast
from pathlib import Path

import devmapper.units

PACKAGE = Path(devmapper.units.__file__).parent
TEXTS = {"strerror", "args", "message"}


def decisions_by_text(source: str) -> list[int]:
    """Lines of tests in which the text of a caught exception, or of what a tool said, is asked."""
    tree = ast.parse(source)
    caught = {
        handler.name
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler) and handler.name
    }
    tests: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            tests.append(node.test)
        elif isinstance(node, ast.Match):
            tests.append(node.subject)
        elif isinstance(node, ast.comprehension):
            tests += node.ifs
    return sorted(
        part.lineno
        for test in tests
        for part in ast.walk(test)
        if isinstance(part, ast.expr) and _is_text(part, caught)
    )


def _is_text(node: ast.expr, caught: set[str]) -> bool:
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if node.attr == "stderr":
            return owner != "sys"
        return owner in caught and node.attr in TEXTS
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = [each.id for each in node.args if isinstance(each, ast.Name)]
        return node.func.id in {"str", "repr", "format"} and bool(caught & set(arguments))
    return False


def test_no_module_reads_messages():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in decisions_by_text(path.read_text())
    ]
    assert found == []


def test_it_would_be_seen():
    before = "try:\n    f()\nexcept OSError as err:\n    "
    for test in (
        'if "busy" in str(err): pass',
        'if err.strerror == "Device or resource busy": pass',
        "x = 1 if err.args[1].startswith('No') else 2",
        "match str(err):\n        case 'busy': pass",
        "y = [1 for e in z if 'exists' in repr(err)]",
        "while 'busy' in err.stderr: pass",
    ):
        assert decisions_by_text(before + test) == [4], test
    assert decisions_by_text(before + "if err.errno == 16: print(str(err))") == []
