"""What a reader of any notebook counts on: the same set-up, links that work, checks that speak."""

import ast
import re

import nbformat
import pytest

from tests.notebook.cells import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"""["'(\s](?:/(?:home|root|tmp|usr|work|mnt|data)/|[A-Z]:\\|~/)""")

notebooks = pytest.mark.parametrize(
    "notebook", [pytest.param(nbformat.read(path, as_version=4), id=path.stem) for path in PATHS]
)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@notebooks
def test_the_head_says_what_it_answers_and_links_to_its_neighbours(notebook, request):
    stem, head = request.node.callspec.id, markdown(notebook)[0]
    assert re.match(rf"# {stem[:2]} \w", head)
    assert "?" in head.split("**Question:** ")[1]
    links = set(re.findall(r"\]\((\d\d_[^)]+)\)", head))
    place = [path.stem for path in PATHS].index(stem)
    assert {path.name for path in PATHS[max(0, place - 1) : place + 2]} - {f"{stem}.ipynb"} <= links


@notebooks
def test_links_to_files_lead_somewhere(notebook):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", "\n".join(markdown(notebook)))
    assert not [link for link in links if not (ROOT / "notebooks" / link).exists()]


@notebooks
def test_other_data_or_another_config_is_a_change_of_two_lines_at_the_top(notebook):
    sources = [cell.source for cell in code_cells(notebook)]
    assert re.search(r'^CONFIG = "configs/\w+\.yaml"', sources[0], re.MULTILINE)
    assert re.search(r'^DATA = "data/DN-LM-demo"', sources[0], re.MULTILINE)
    assert re.search(r"bench = open_workbench\(CONFIG, DATA[,)]", sources[0])
    assert not [source for source in sources[1:] if "DN-LM-demo" in source]
    assert not [cell.id for cell in notebook.cells if ABSOLUTE.search(cell.source)]


@notebooks
def test_there_are_checks_and_each_says_what_is_wrong(notebook):
    trees = [ast.parse(cell.source) for cell in code_cells(notebook)]
    checks = [each for tree in trees for each in ast.walk(tree) if isinstance(each, ast.Assert)]
    assert checks, "a notebook without checks is a demo"
    assert not [ast.unparse(check) for check in checks if not check.msg]


@notebooks
def test_nothing_that_hangs_or_is_not_thread_safe(notebook):
    """A shell command outlives a cell's time limit."""
    sources = [cell.source for cell in code_cells(notebook)]
    assert not [each for each in sources if re.search(r"^\s*[!%]|pyplot|subprocess", each)]
