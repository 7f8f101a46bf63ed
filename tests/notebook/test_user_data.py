"""The notebooks on a user's own folder, given by DIFFBUF_DATA: other names, counts, lengths."""

import pytest

from tests.notebook.cells import ROOT, first_failed_check
from tests.notebook.folders import make_paired_folder


def is_quick(path):
    return any(topic in path.stem for topic in ("io_shapes", "stft", "one_step"))


NOTEBOOKS = [
    pytest.param(path, id=path.stem, marks=() if is_quick(path) else pytest.mark.slow)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


@pytest.fixture(params=[1, 2], ids=["mono", "stereo"])
def own_data(request, workspace, tmp_path, monkeypatch):
    data = make_paired_folder(tmp_path / "my data", channels=request.param)
    monkeypatch.setenv("DIFFBUF_DATA", str(data))
    return data


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs_on_a_users_folder(own_data, workspace, path):
    before = {each.name for each in workspace.iterdir()}
    assert first_failed_check(path) is None
    unexpected = {each.name for each in workspace.iterdir()} - before
    assert not unexpected, "a notebook writes below bench.results, not beside itself"
