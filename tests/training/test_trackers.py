"""Trackers: what a run writes is read back; one that fails, or is not there, stops no run."""

import importlib.util
import json
import sqlite3
import sys
import warnings
from unittest.mock import Mock, call

import pytest
import soundfile
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffbuf_lib.errors import NonFiniteError
from diffbuf_lib.registry import TRACKERS
from tests.training.helpers import Clips, config, fit

OWN = "training.num_epochs=1", "training.trackers=[listener,tensorboard]"


@pytest.fixture
def listener():
    """A tracker of one's own."""
    listener = Mock(link="https://example.org/1")
    listener.name = "one"
    TRACKERS.add("listener", lambda *args: listener)
    yield listener
    del TRACKERS["listener"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run's folder, and that of trackio, without an account and then resumed."""
    for package in ("wandb", "trackio"):
        importlib.util.find_spec(package) or pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of wandb's and trackio's own
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(folder / "netrc"))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        cfg = config("training.num_epochs=1", "training.trackers=[tensorboard,wandb,trackio]")
        fit(cfg, folder / "my run")
        fit(cfg.override("training.num_epochs=2"), folder / "my run", resume=True)
        sys.modules["wandb"].teardown()
    return folder


def assert_sound_and_picture(sound, picture):
    assert (soundfile.info(sound).frames, soundfile.info(sound).samplerate) == (4000, 16000)
    with Image.open(picture) as image:
        assert image.width > 300


def test_wandb_offline_holds_scalars_config_sound_and_picture(told):
    first, second = sorted((told / "my run" / "wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2], "one run, resumed"
    for run in (first, second):
        content = next(run.glob("*.wandb")).read_bytes()
        for name in (b"train/loss", b"valid/si_sdr", b"results_path", b"ema_momentum"):
            assert name in content
    sound, picture = first.rglob("estimate_3_*.wav"), second.rglob("spectrogram_6_*.png")
    assert_sound_and_picture(next(sound), next(picture))


def test_tensorboard_holds_scalars_and_sound(told):
    events = EventAccumulator(str(told / "my run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 7))
    assert [event.step for event in events.Scalars("valid/si_sdr")] == [3, 6]
    assert [event.step for event in events.Audio("audio/estimate")] == [3, 6]


def test_trackio_holds_scalars_config_sound_and_picture(told):
    with sqlite3.connect(told / "trackio" / "diffbuf.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        ((configured,),) = database.execute("select distinct config from configs").fetchall()
    assert len({name for name, *_ in rows}) == 1
    rows = [(step, json.loads(line)) for _, step, line in rows]
    assert sorted(step for step, line in rows if "train/loss" in line) == list(range(1, 7))
    assert [step for step, line in rows if "valid/si_sdr" in line] == [3, 6]
    assert json.loads(configured)["training"]["lr"] == 1e-3
    sounds, pictures = ([*(told / "trackio").rglob(f"media/**/*.{x}")] for x in ("wav", "png"))
    assert len(sounds) == 6
    assert_sound_and_picture(sounds[0], pictures[0])


def test_a_folder_says_where_its_run_can_be_seen(told):
    links = json.loads((told / "my run" / "trackers.json").read_text())
    assert links["wandb"]["link"].startswith("wandb sync '")
    assert links["trackio"]["link"].startswith("trackio show")


def test_a_failure_is_told_with_its_capsule(listener, tmp_path):
    with pytest.raises(NonFiniteError):
        fit(config(*OWN), tmp_path, train_set=Clips(bad=range(7)))
    ((name, text, step),) = [told.args for told in listener.text.call_args_list]
    assert (name, step) == ("failure", 1)
    assert str(tmp_path / "capsule_1") in text
    assert listener.method_calls[-1] == call.close()


@pytest.mark.parametrize("method", ["scalars", "example", "close"])
def test_one_that_fails_is_one_warning_and_stops_nothing(listener, tmp_path, method):
    getattr(listener, method).side_effect = OSError("gone")
    with pytest.warns(UserWarning, match="listener .*gone") as caught:
        assert len(fit(config(*OWN), tmp_path)) == 3
    assert len(caught) == 1
    assert getattr(listener, method).call_count == 1
    assert next((tmp_path / "tensorboard").iterdir()).stat().st_size > 1000


def test_one_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match=r"diffbuf\[wandb\]"):
        fit(config("training.num_steps=1", "training.trackers=[wandb]"), tmp_path)
    assert not (tmp_path / "trackers.json").exists()
