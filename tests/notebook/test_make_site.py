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


def test_a_page_holds_its_pictures_and_ends_at_a_failing_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "notebooks"))  # where `walk` is
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    head = "# A\n\n**Question:** what & why?\n\nNext: [B](01_b.ipynb#end)"
    cells = [new_markdown_cell(head), new_code_cell(PANEL), new_code_cell("1 / 0")]
    kernel = {"kernelspec": {"display_name": "", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "00_a.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        module.make_site(tmp_path, tmp_path)
    nbformat.write(new_notebook(cells=cells[:2], metadata=kernel), tmp_path / "00_a.ipynb")
    module.make_site(tmp_path, tmp_path)
    index, page = ((tmp_path / f"{name}.html").read_text() for name in ("index", "00_a"))
    assert "what &amp; why?" in index
    assert 'href="00_a.html"' in index
    assert 'href="01_b.html#end"' in page
    assert page.count("data:image/jpeg;base64,") == 1
    for text in (index, page):
        assert not re.search(r"""(?:src|href)=["']?https?:|<script""", text), "needs the network"
