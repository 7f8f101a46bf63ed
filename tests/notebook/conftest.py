"""A copy of the notebooks to run in, and the dataset that they run on."""

import pytest
import torch

from diffbuf_lib.data import build_demo
from tests.notebook.cells import DEMO, copy_workspace


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A copy of notebooks and configs as the working directory, on the demo set."""
    folder = copy_workspace(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIFFBUF_DATA", str(build_demo(DEMO)))
    monkeypatch.delenv("DIFFBUF_CONFIG", raising=False)
    with torch.random.fork_rng():
        yield folder
