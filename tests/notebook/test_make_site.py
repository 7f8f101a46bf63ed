"""Pages to read without Jupyter: pictures in them, links between them, nothing from afar."""

import importlib.util
import re
import sys

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.notebook.cells import ROOT

PANEL = """
from matplotlib.figure import Figure
from walk import Panel
panel = Panel([], "a line")
panel.draw(Figure(figsize=(2, 1)))
panel
"""


@pytest.fixture(scope="module")
def make_site():
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_notebook(folder, name, *cells):
    folder.mkdir(exist_ok=True)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=list(cells), metadata=kernel), folder / name)


def test_pages_hold_pictures_and_link_to_each_other(make_site, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "notebooks"))  # where `walk` is
    links = "Next: [01 B](01_b.ipynb#end), [README](../README.md)"
    head = new_markdown_cell(f"# 00 A\n\n**Question:** what & why?\n\n{links}")
    write_notebook(tmp_path / "in", "00_a.ipynb", head, new_code_cell(PANEL))
    write_notebook(tmp_path / "in", "01_b.ipynb", new_markdown_cell("# 01 B"), new_code_cell("6*7"))
    entries = make_site.make_site(tmp_path / "in", tmp_path / "out")

    assert [entry.title for entry in entries] == ["00 A", "01 B"]
    index, first, second = (
        (tmp_path / "out" / name).read_text() for name in ("index.html", "00_a.html", "01_b.html")
    )
    assert "what &amp; why?" in index
    assert 'href="00_a.html"' in index
    assert 'href="01_b.html"' in index
    assert 'href="01_b.html#end"' in first
    assert ".ipynb" not in first
    assert first.count("data:image/jpeg;base64,") == 1
    assert "42" in second
    for page in (index, first, second):
        assert not re.search(r"""(?:src|href)=["']?https?:""", page), "needs the network"
        assert "<script" not in page


def test_a_failing_cell_ends_the_build_with_its_traceback(make_site, tmp_path):
    write_notebook(tmp_path / "in", "00_a.ipynb", new_code_cell("assert 1 == 2, 'planted'"))
    with pytest.raises(CellExecutionError, match="planted"):
        make_site.make_site(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "index.html").exists()
