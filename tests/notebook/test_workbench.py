"""What the set-up cell of every notebook gives, from whichever folder and environment it runs."""

import pytest
import torch

from tests.conftest import refused
from tests.notebook.cells import CONFIG
from tests.notebook.folders import make_paired_folder
from walk import open_workbench, workbench


@pytest.fixture
def data(project):
    return make_paired_folder(project / "data" / "mine")


@pytest.mark.parametrize("where", [".", "notebooks", "notebooks/deeper"])
def test_paths_start_at_the_project_wherever_the_kernel_does(project, data, monkeypatch, where):
    (project / where).mkdir(exist_ok=True)
    monkeypatch.chdir(project / where)
    bench = open_workbench(CONFIG, "data/mine", ["diffusion_buffer.t_max=0.5"])
    assert (bench.root, bench.data) == (project, data)
    assert bench.results == project / "results" / "notebooks"
    assert not bench.results.exists(), "nothing is written before a notebook writes"
    times = bench.cfg.diffusion_buffer
    assert (times.buffer_size, times.t_max) == (5, 0.5)
    assert (len(bench.train_set), len(bench.valid_set)) == (5, 3)
    assert bench.train_set.training
    assert not bench.valid_set.training


def test_environment_wins_over_the_notebooks_lines(project, data, monkeypatch):
    other = make_paired_folder(project / "other", train=2, channels=2)
    (project / "mine.yaml").write_text("diffusion_buffer: {buffer_size: 3}\n")
    monkeypatch.setenv("DIFFBUF_DATA", str(other))
    monkeypatch.setenv("DIFFBUF_CONFIG", "mine.yaml")
    bench = open_workbench(CONFIG, "data/mine")
    assert (bench.data, len(bench.train_set)) == (other, 2)
    assert bench.cfg.diffusion_buffer.buffer_size == 3
    assert bench.valid_set[0][0].shape[0] == 2, "stereo clips stay stereo"


@pytest.mark.law
def test_the_same_cell_gives_the_same_numbers(data):
    draws = []
    for _ in range(2):
        open_workbench(CONFIG, data)
        draws.append(torch.randn(4))
    assert torch.equal(*draws)


def test_what_serves_for_both_splits_is_made_or_is_missing(project, data, monkeypatch):
    assert len(open_workbench(CONFIG, data / "train").valid_set) == 5
    (data / "valid").rename(project / "empty")
    bench = open_workbench(CONFIG, data)
    assert bench.valid_set.items == bench.train_set.items
    refused(lambda: open_workbench(CONFIG, "empty/clean"), "empty", "DIFFBUF_DATA")
    monkeypatch.setattr(workbench, "build_demo", make_paired_folder)  # only where it is asked for
    demo = open_workbench(CONFIG, "data/DN-LM-demo").data
    assert demo == project / "data" / "DN-LM-demo"
    assert len(list(demo.iterdir())) == 2
