"""A copy of the notebooks to run in, the dataset that they run on, and a batch."""

import pytest
import torch

from recipes.demo.demo_set import build_demo
from tests.conftest import seeded
from tests.notebook.cells import CONFIG, DEMO, copy_workspace


def batch():
    """Mix and target, [2, 1, 1600] each."""
    wave = torch.randn(2, 1, 1600, generator=seeded(3)) * 0.1
    return wave + torch.randn(2, 1, 1600, generator=seeded(4)) * 0.1, wave


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A copy of notebooks and configs as the working directory, on the demo set."""
    folder = copy_workspace(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIFFBUF_DATA", str(build_demo(DEMO)))
    monkeypatch.delenv("DIFFBUF_CONFIG", raising=False)
    with torch.random.fork_rng():
        yield folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder with notebooks/ as the working directory, and no environment."""
    (tmp_path / "configs").mkdir()
    (tmp_path / CONFIG).write_text("diffusion_buffer: {buffer_size: 5}\n")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    for name in ("DIFFBUF_DATA", "DIFFBUF_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
