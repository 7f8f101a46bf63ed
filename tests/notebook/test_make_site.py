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


def test_pages_hold_pictures_link_to_each_other_and_end_at_a_failing_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "notebooks"))  # where `walk` is
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(notebooks):
        for name, cells in notebooks.items():
            kernel = {"kernelspec": {"display_name": "", "language": "python", "name": "python3"}}
            path = tmp_path / "in" / f"{name}.ipynb"
            path.parent.mkdir(exist_ok=True)
            nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
        module.make_site(tmp_path / "in", tmp_path / "out")
        return {path.stem: path.read_text() for path in (tmp_path / "out").iterdir()}

    head = new_markdown_cell("# A\n\n**Question:** what & why?\n\nNext: [B](01_b.ipynb#end)")
    pages = make({"00_a": [head, new_code_cell(PANEL)], "01_b": [new_code_cell("6*7")]})
    assert "what &amp; why?" in pages["index"]
    assert pages["index"].index('href="00_a.html"') < pages["index"].index('href="01_b.html"')
    assert 'href="01_b.html#end"' in pages["00_a"]
    assert pages["00_a"].count("data:image/jpeg;base64,") == 1
    assert "42" in pages["01_b"]
    for page in pages.values():
        assert not re.search(r"""(?:src|href)=["']?https?:""", page), "needs the network"
        assert "<script" not in page
    with pytest.raises(CellExecutionError, match="planted"):
        make({"00_a": [new_code_cell("assert 1 == 2, 'planted'")]})
