"""A run's copy elsewhere: a new machine goes on from it, and its failures stop nothing."""

import shutil
import threading

import fsspec
import pytest

from diffbuf_lib.training import run, train
from tests.conftest import refused
from tests.training.helpers import Clips, assert_same_run, config, fit, last

URL = "memory://runs/one"
MIRROR = [f"training.mirror={URL}", "training.num_epochs=3"]


@pytest.fixture
def store():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.mark.law
def test_a_new_machine_goes_on_from_the_mirror(store, tmp_path):
    fit(config("training.num_epochs=3"), tmp_path / "whole")
    for machine, steps in (("a", 2), ("b", 3), ("a", 1), ("c", None)):  # a comes back, outdated
        fit(config(*MIRROR), tmp_path / machine, steps=steps, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "c")
    assert (tmp_path / "c" / "model" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob(".mirror*"))
    shutil.rmtree(tmp_path / "c")
    fit(config(*MIRROR, "training.num_epochs=4"), tmp_path / "c", resume=True)
    assert last(tmp_path / "c")["step"] == 12


@pytest.mark.law
def test_copying_neither_holds_up_a_step_nor_queues_up(store, tmp_path, monkeypatch):
    put, gate, steps = type(store).put_file, threading.Event(), []

    def slow(self, path, name, **options):
        gate.wait(60)
        steps.append(name)
        return put(self, path, name, **options)

    monkeypatch.setattr(type(store), "put_file", slow)
    cfg = config(*MIRROR, "training.checkpoint_every=1")
    for record in train(cfg, Clips(), None, tmp_path, device="cpu"):
        if record.step == 9:
            gate.set()
    assert sum(name.endswith("last.pt") for name in steps) == 2  # the first one, and the newest
    assert steps[-1].endswith("place.json")
    store.get_file("/runs/one/checkpoints/last.pt", str(tmp_path / "copy.pt"))
    assert (tmp_path / "copy.pt").read_bytes() == (tmp_path / "checkpoints/last.pt").read_bytes()


def test_a_mirror_that_fails_is_a_warning_and_later_one_line(store, tmp_path, monkeypatch):
    def broken(self, *args, **options):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(type(store), "put_file", broken)
    with pytest.warns(UserWarning, match=r"training\.mirror .*PermissionError"):
        fit(config(*MIRROR), tmp_path / "a")
    assert last(tmp_path / "a")["step"] == 9
    monkeypatch.setattr(type(store), "exists", broken)
    refused(lambda: fit(config(*MIRROR), tmp_path / "b", resume=True), URL, "Forbidden")


def test_minutes_between_checkpoints(tmp_path, monkeypatch):
    now, saved = iter(range(0, 10**6, 40)), []  # s, at each look at the clock
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(run, "save_checkpoint", lambda path, state: saved.append(state["step"]))
    settings = "training.num_epochs=1", "training.batch_size=1", "training.checkpoint_minutes=2"
    fit(config(*settings), tmp_path, valid_set=None)
    assert saved[0] == 0
    assert saved[-1] == 7
    assert 3 <= len(saved) <= 5
