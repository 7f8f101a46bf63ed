"""The notebooks on a user's own folder, given by DIFFBUF_DATA: other names, counts, lengths."""

import pytest

from tests.notebook.cells import find, first_failed_check
from tests.notebook.folders import make_paired_folder

QUICK = {"01", "02", "05"}
NUMBERS = [f"{number:02}" for number in range(10)]


@pytest.fixture(params=[1, 2], ids=["mono", "stereo"])
def own_data(request, workspace, tmp_path, monkeypatch):
    data = make_paired_folder(tmp_path / "my data", channels=request.param)
    monkeypatch.setenv("DIFFBUF_DATA", str(data))
    return data


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NUMBERS],
)
def test_notebook_runs_on_a_users_folder(own_data, workspace, number):
    assert first_failed_check(find(number)) is None
    unexpected = {path.name for path in workspace.iterdir()} - {
        path.name for path in find(number).parent.iterdir()
    }
    assert not unexpected, "a notebook writes below bench.results, not beside itself"
