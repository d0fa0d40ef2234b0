"""Imports point one way, command -> export, trainer -> runtime, and run in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {  # what each source root may import of ours, besides itself
    "epsrt": set(),
    "epsrt_trainer": {"epsrt"},
    "epsrt_export": {"epsrt", "epsrt_trainer"},
    "epsrt_command": {"epsrt", "epsrt_trainer", "epsrt_export"},
}
ROOTS = {"epsrt": "runtime", "epsrt_trainer": "trainer", "epsrt_export": "export", "epsrt_command": "command"}


def modules(roots: dict[str, Path]) -> dict[str, Path]:
    """Every module's file, by its dotted name."""
    found = {}
    for package, root in roots.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it: those in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield node.module


def graph(roots: dict[str, Path]) -> dict[str, set[str]]:
    known = modules(roots)
    return {module: set(imports(path, known)) - {module} for module, path in known.items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in arrows[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in arrows:
        if module not in index:
            visit(module)
    return found


def upward(arrows: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} -> {other}"
        for module, others in arrows.items()
        for other in sorted(others)
        if (below := other.split(".")[0]) != (own := module.split(".")[0]) and below not in BELOW[own]
    ]


@pytest.fixture(scope="module")
def ours() -> dict[str, set[str]]:
    return graph({package: ROOT / root for package, root in ROOTS.items()})


def test_no_import_circle(ours):
    assert len(ours) > 100
    assert circles(ours) == []


def test_no_import_points_upwards(ours):
    assert upward(ours) == []


def test_the_test_sees_a_circle_and_an_upward_import(tmp_path):
    files = {
        "epsrt/__init__.py": "",
        "epsrt/a.py": "from epsrt.b import x",
        "epsrt/b.py": "def f():\n    from epsrt import c",
        "epsrt/c.py": "from __future__ import annotations\nif x:\n    import epsrt.a",
        "epsrt_trainer/__init__.py": "import epsrt.a",
        "epsrt_export/__init__.py": "",
        "epsrt/d.py": "from epsrt_export import export",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    arrows = graph(dict.fromkeys(("epsrt", "epsrt_trainer", "epsrt_export"), tmp_path))
    assert circles(arrows) == [["epsrt.a", "epsrt.b", "epsrt.c"]]
    assert upward(arrows) == ["epsrt.d -> epsrt_export"]


def names_of(source: str) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_the_runtime_names_neither_torch_nor_onnx_and_the_test_sees_one_in_a_function():
    never = {"torch", "onnx", "onnx_ir", "onnxscript", "polygraphy"}
    for path in (ROOT / "runtime").rglob("*.py"):
        assert not names_of(path.read_text()) & never, path
    assert names_of("def read():\n    import onnx.helper\n    from torch import nn") == {"onnx", "torch"}
