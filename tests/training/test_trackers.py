"""Trackers: what a run writes is read back; one that fails, or is not there, stops no run."""

import importlib.util
import json
import os
import sqlite3
import struct
import sys
import warnings

import pytest
import soundfile
from PIL import Image

from diffbuf_lib.errors import NonFiniteError
from diffbuf_lib.registry import TRACKERS
from tests.training.helpers import Clips, config, fit

ONE = "training.num_epochs=1"


class Listener:
    """A tracker of one's own; raises in `fails`."""

    link, name, fails = "https://example.org/1", "one", ""

    def __init__(self, cfg, folder, step):
        self.told = []
        Listener.last = self

    def __getattr__(self, method):
        def note(*args):
            self.told.append((method, *args))
            if method == self.fails:
                raise OSError("gone")

        return note


@pytest.fixture
def listener(monkeypatch):
    TRACKERS.add("listener", Listener)
    yield Listener
    del TRACKERS["listener"]
    Listener.fails = ""


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
        cfg = config(ONE, "training.trackers=[tensorboard,wandb,trackio]")
        fit(cfg, folder / "my run")
        fit(cfg.override("training.num_epochs=2"), folder / "my run", resume=True)
        sys.modules["wandb"].teardown()
    return folder


def wandb_records(run):
    """Read W&B's file: after a head of 7 bytes LevelDB's log, blocks of 32 KiB of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("*.wandb")
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little for another record's head: checksum, length, type
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline_holds_scalars_config_sound_and_picture(told):
    first, second = sorted((told / "my run" / "wandb").glob("offline-run-*"))
    records = [*wandb_records(first), *wandb_records(second)]
    runs = {record.run.run_id for record in records if record.HasField("run")}
    assert len(runs) == 1, "a resumed run is another one"
    keys = {item.key for record in records for item in record.run.config.update}
    assert {"training", "results_path"} <= keys
    lines = [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    steps = [int(line["_step"]) for line in lines if "train/loss" in line]
    assert steps == list(range(1, 7))
    assert [int(line["_step"]) for line in lines if "valid/si_sdr" in line] == [3, 6]
    audio, rate = soundfile.read(next(first.rglob("estimate_3_*.wav")))
    assert len(audio) == 4000
    assert rate == 16000
    with Image.open(next(second.rglob("spectrogram_6_*.png"))) as picture:
        assert picture.width > 300


def test_trackio_holds_scalars_config_sound_and_picture(told):
    with sqlite3.connect(told / "trackio" / "diffbuf.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        ((configured,),) = database.execute("select distinct config from configs").fetchall()
    assert len({name for name, *_ in rows}) == 1
    lines = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert sorted(step for step, line in lines if "train/loss" in line) == list(range(1, 7))
    assert [step for step, line in lines if "valid/si_sdr" in line] == [3, 6]
    assert json.loads(configured)["training"]["lr"] == 1e-3
    media = told / "trackio" / "media"
    assert len(list(media.rglob("*.wav"))) == 6
    assert soundfile.info(next(media.rglob("*.wav"))).frames == 4000
    with Image.open(next(media.rglob("*.png"))) as picture:
        assert picture.width > 300


def test_a_folder_says_where_its_run_can_be_seen(told):
    links = json.loads((told / "my run" / "trackers.json").read_text())
    assert links["wandb"]["link"].startswith("wandb sync '")
    assert links["trackio"]["link"] == "trackio show --project diffbuf"


def test_a_failure_is_told_with_its_capsule(listener, tmp_path):
    cfg = config(ONE, "training.trackers=[listener]")
    with pytest.raises(NonFiniteError):
        fit(cfg, tmp_path, train_set=Clips(bad=range(7)))
    ((_, name, text, step),) = [call for call in listener.last.told if call[0] == "text"]
    assert (name, step) == ("failure", 1)
    assert str(tmp_path / "capsule_1") in text
    assert listener.last.told[-1] == ("close",)


@pytest.mark.parametrize("method", ["scalars", "example", "close"])
def test_one_that_fails_is_one_warning_and_stops_nothing(listener, tmp_path, method):
    listener.fails = method
    with pytest.warns(UserWarning, match="tracker listener .* OSError: gone") as caught:
        records = fit(config(ONE, "training.trackers=[listener,tensorboard]"), tmp_path)
    assert len(records) == 3
    assert len(caught) == 1
    assert [call[0] for call in listener.last.told].count(method) == 1
    assert next((tmp_path / "tensorboard").iterdir()).stat().st_size > 1000


def test_one_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match=r"pip install 'diffbuf\[wandb\]'"):
        fit(config("training.num_steps=1", "training.trackers=[wandb]"), tmp_path)
    assert not os.path.exists(tmp_path / "trackers.json")
