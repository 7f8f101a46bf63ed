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


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


@notebooks
def test_the_head_says_what_it_answers_and_links_lead_somewhere(notebook, request):
    stem, texts = request.node.callspec.id, sources(notebook, "markdown")
    assert re.match(rf"# {stem[:2]} \w", texts[0])
    assert "?" in texts[0].split("**Question:** ")[1]
    place = [path.stem for path in PATHS].index(stem)
    neighbours = {path.name for path in PATHS[max(0, place - 1) : place + 2]} - {f"{stem}.ipynb"}
    assert neighbours <= set(re.findall(r"\]\(([^)#]+)", texts[0]))
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", "\n".join(texts))
    assert not [link for link in links if not (ROOT / "notebooks" / link).exists()]


@notebooks
def test_other_data_or_another_config_is_a_change_of_two_lines_at_the_top(notebook):
    first, *others = sources(notebook, "code")
    assert re.search(r'^CONFIG = "configs/\w+\.yaml"', first, re.MULTILINE)
    assert re.search(r'^DATA = "data/DN-LM-demo"', first, re.MULTILINE)
    assert re.search(r"bench = open_workbench\(CONFIG, DATA[,)]", first)
    assert not [source for source in others if "DN-LM-demo" in source]
    assert not [cell.id for cell in notebook.cells if ABSOLUTE.search(cell.source)]


@notebooks
def test_checks_say_what_is_wrong_and_nothing_hangs_or_is_not_thread_safe(notebook):
    code = sources(notebook, "code")
    trees = [node for source in code for node in ast.walk(ast.parse(source))]
    checks = [node for node in trees if isinstance(node, ast.Assert)]
    assert checks, "a notebook without checks is a demo"
    assert not [ast.unparse(check) for check in checks if not check.msg]
    # A shell command outlives a cell's time limit.
    assert not [each for each in code if re.search(r"^\s*[!%]|pyplot|subprocess", each)]
