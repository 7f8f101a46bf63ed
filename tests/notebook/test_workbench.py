"""What the set-up cell of every notebook gives, from whichever folder and environment it runs."""

import pytest
import torch

from diffbuf_lib.errors import ConfigError, DataError
from diffbuf_lib.notebook import open_workbench, workbench
from tests.notebook.folders import make_paired_folder

CONFIG = "configs/debug.yaml"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder with notebooks/ as the working directory, and no environment."""
    (tmp_path / "configs").mkdir()
    (tmp_path / CONFIG).write_text("diffusion_buffer: {buffer_size: 5}\n")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("DIFFBUF_DATA", raising=False)
    monkeypatch.delenv("DIFFBUF_CONFIG", raising=False)
    return tmp_path


@pytest.fixture
def data(project):
    return make_paired_folder(project / "data" / "mine")


@pytest.mark.parametrize("where", [".", "notebooks", "notebooks/deeper"])
def test_paths_start_at_the_project_wherever_the_kernel_does(project, data, monkeypatch, where):
    (project / where).mkdir(exist_ok=True)
    monkeypatch.chdir(project / where)
    bench = open_workbench(CONFIG, "data/mine")
    assert (bench.root, bench.data) == (project, data)
    assert bench.results == project / "results" / "notebooks"
    assert not bench.results.exists(), "nothing is written before a notebook writes"
    assert bench.cfg.diffusion_buffer.buffer_size == 5


def test_splits_are_opened_for_their_use(data):
    bench = open_workbench(CONFIG, data)
    assert (len(bench.train_set), len(bench.valid_set)) == (5, 3)
    assert bench.train_set.training
    assert not bench.valid_set.training
    assert "5 training, 3 validation clips" in str(bench)
    assert "B = 5" in str(bench)


def test_environment_wins_over_the_notebooks_lines(project, data, monkeypatch):
    other = make_paired_folder(project / "other", train=2)
    (project / "mine.yaml").write_text("diffusion_buffer: {buffer_size: 3}\n")
    monkeypatch.setenv("DIFFBUF_DATA", str(other))
    monkeypatch.setenv("DIFFBUF_CONFIG", "mine.yaml")
    bench = open_workbench(CONFIG, "data/mine")
    assert (bench.data, len(bench.train_set)) == (other, 2)
    assert bench.cfg.diffusion_buffer.buffer_size == 3


def test_overrides_win_over_the_file(data):
    bench = open_workbench(CONFIG, data, ["diffusion_buffer.buffer_size=7"])
    assert bench.cfg.diffusion_buffer.buffer_size == 7


def test_folder_without_splits_gives_its_clips_to_both(data):
    bench = open_workbench(CONFIG, data / "train")
    assert len(bench.train_set) == len(bench.valid_set) == 5
    assert not bench.valid_set.training


def test_folder_without_valid_gives_its_training_clips_from_their_start(data):
    (data / "valid").rename(data / "aside")
    bench = open_workbench(CONFIG, data)
    assert bench.valid_set.items == bench.train_set.items
    assert not bench.valid_set.training


def test_stereo_clips_stay_stereo(project):
    bench = open_workbench(CONFIG, make_paired_folder(project / "stereo", channels=2))
    assert bench.valid_set[0][0].shape[0] == 2


def test_demo_set_is_made_where_it_is_asked_for_and_only_there(project, data, monkeypatch):
    made = []
    monkeypatch.setattr(
        workbench, "build_demo", lambda folder: made.append(make_paired_folder(folder))
    )
    open_workbench(CONFIG, "data/mine")
    assert not made
    bench = open_workbench(CONFIG, "data/DN-LM-demo")
    assert made == [project / "data" / "DN-LM-demo"] == [bench.data]


def test_the_same_cell_gives_the_same_numbers(data):
    draws = []
    for _ in range(2):
        open_workbench(CONFIG, data)
        draws.append(torch.randn(4))
    assert torch.equal(*draws)


def test_a_folder_without_clips_is_named_with_what_it_should_hold(project):
    (project / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no clips: DATA .*DIFFBUF_DATA.* clean/"):
        open_workbench(CONFIG, "empty")


def test_a_missing_config_is_named(data):
    with pytest.raises(ConfigError, match="missing"):
        open_workbench("configs/missing.yaml", data)
