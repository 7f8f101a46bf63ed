"""The plan of the library: imports run downward, and a module's name is its only one."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "diffbuf_lib"
# From the bottom up: a part imports only from groups to the left of its own.
LAYERS = (
    "errors pretrained foreign options | registry | config trace | data diffusion | networks"
    " | model | graph | streaming | live figures launch | enhance export training"
    " | diagnostics evaluation authors"
    " | commands | cli"
)
LEVEL = {part: i for i, line in enumerate(LAYERS.split("|")) for part in line.split()}


def imported(node):
    """Yield what a piece of code imports from the library, in functions too, but not for types."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    yield from (name[12:] for name in names if name.startswith("diffbuf_lib."))
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from imported(child)


TEXTS = {
    ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__"): (
        path.read_text()
    )
    for path in LIBRARY.rglob("*.py")
}
IMPORTS = {name: set(imported(ast.parse(text))) for name, text in TEXTS.items()}


def test_imports_run_downward():
    arrows = [(a, b) for a in IMPORTS for b in IMPORTS[a] if a != "__init__"]
    parts = {(a.split(".")[0], b.split(".")[0], f"{a} -> {b}") for a, b in arrows}
    assert [arrow for a, b, arrow in parts if a != b and LEVEL[a] <= LEVEL[b]] == []
    modules = [(a, b if b in TEXTS else b.rpartition(".")[0]) for a, b in arrows]
    TopologicalSorter({a: [d for c, d in modules if c == a] for a in TEXTS}).prepare()


def test_no_module_name_twice():
    count = Counter(name.rpartition(".")[2] for name in TEXTS)
    assert [name for name in count if count[name] > 1] == []


@pytest.mark.parametrize("trick", ["unittest.mock", "f_locals", "__dict__[", ", BlockCausal)"])
def test_no_tricks(trick):
    assert [name for name, text in TEXTS.items() if trick in text] == []
