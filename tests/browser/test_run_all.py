"""Run All in every notebook, as a reader does, and what must then be on the page."""

import pytest

from tests.notebook.cells import ROOT

# The others have tests of their panels, which begin with Run All; `make test-long` runs them here.
QUICK = ("00",)
NOTEBOOKS = [
    pytest.param(path.name, marks=() if path.name[:2] in QUICK else pytest.mark.slow, id=path.stem)
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
]

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_shows_every_output(open_notebook, name):
    page = open_notebook(name)
    page.run_all()
    page.screenshot()
    assert page.page.locator(".jp-OutputArea img").count() > 0, "no picture at all"
    assert not page.problems()
