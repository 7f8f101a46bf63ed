"""The training panel without a browser: the laws of Start, Pause, Resume, Stop and Save."""

import os
import signal
import threading
import time

import pytest
import torch
from matplotlib.figure import Figure

from diffbuf_lib.errors import DataError
from tests.training.helpers import Clips, assert_same_state, config, fit, last
from walk import TrainingPanel, remove_run, training_panel

LONG = ("training.num_epochs=4000", "training.valid_every=4000")
PATIENCE = 60  # s; for what takes milliseconds on a machine with nothing else to do


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make panels over one folder; no thread may be left when the test is over.

    Their pictures are blank: those of `training_progress` take longer than all else.
    """
    blank = Figure(figsize=(1, 1))
    monkeypatch.setattr(training_panel, "training_progress", lambda *args, **options: blank)
    panels = []

    def make(*changes, **options):
        options = {"train_set": Clips(), "valid_set": Clips(3, seed=1), **options}
        cfg = config(*(changes or LONG))
        panels.append(TrainingPanel(cfg, results_path=tmp_path / "run", device="cpu", **options))
        return panels[-1]

    yield make
    for panel in panels:
        panel.close()
    assert not threads()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "diffbuf-worker"]


def run_to(step, panel):
    panel.start()
    assert panel.wait(step=step, timeout=PATIENCE)
    return panel


def eventually(what):
    end = time.monotonic() + PATIENCE
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


@pytest.mark.law
def test_a_finished_run_is_that_of_a_plain_loop(make, tmp_path):
    """And its clip is enhanced with the averaged weights, always with the same noise."""
    panel = make("training.num_epochs=2")
    run_to(None, panel)
    plain = fit(config(), tmp_path / "plain")
    assert [(r.step, r.loss, r.valid) for r in panel.records] == [
        (r.step, r.loss, r.valid) for r in plain
    ]
    assert_same_state(tmp_path / "run", tmp_path / "plain")
    assert not threads()
    assert panel.clip_step == panel.steps
    noise = torch.Generator().manual_seed(0)
    again = panel.model.enhance(panel.clip["mix"][None, None], noise)[0, 0]
    assert torch.equal(panel.clip["estimate"], again)
    averaged = last(panel.folder.path)["ema"]
    for name, weight in panel.model.state_dict().items():
        assert torch.equal(weight, averaged[f"module.{name}"])


@pytest.mark.law
def test_no_step_is_made_during_a_pause(make):
    panel = run_to(3, make())
    panel.pause()
    assert not panel.wait(), "a paused run has no end to wait for"
    before = panel.steps
    assert panel.paused
    assert not panel.running
    time.sleep(0.3)
    assert panel.steps == before
    panel.buttons["resume"].click()
    assert panel.wait(step=before + 2, timeout=PATIENCE)
    panel.buttons["pause"].click()
    assert eventually(lambda: panel.paused)
    panel.buttons["save"].click()
    panel.buttons["stop"].click()
    assert panel.wait(timeout=PATIENCE)
    assert [name for name, each in panel.buttons.items() if not each.disabled] == ["start"]
    assert panel.status.value.startswith("stopped")


@pytest.mark.law
def test_pausing_saving_stopping_and_resuming_change_nothing(make, tmp_path):
    changes = "training.num_epochs=3"
    panel = make(changes)
    panel.start()
    panel.pause()
    panel.save()
    panel.resume()
    panel.wait(step=2, timeout=PATIENCE)
    panel.pause()
    panel.save()
    assert panel.paused
    assert last(tmp_path / "run")["step"] == panel.steps
    panel.resume()
    panel.stop()
    panel.start()
    panel.save()
    assert panel.wait(timeout=PATIENCE)
    assert [r.step for r in panel.records] == list(range(1, 10))
    fit(config(changes), tmp_path / "plain")
    assert_same_state(tmp_path / "run", tmp_path / "plain")


@pytest.mark.law
def test_stop_leaves_a_checkpoint_that_a_new_panel_goes_on_from(make, tmp_path):
    panel = run_to(4, make())
    panel.stop()
    stopped_at = panel.steps
    assert last(tmp_path / "run")["step"] == stopped_at
    assert not threads()

    other = make()
    assert [r.step for r in other.records] == list(range(1, stopped_at + 1))
    run_to(stopped_at + 1, other)
    third = make()  # takes the folder over from a panel that runs
    assert not threads()
    for panel in (other, third):
        assert [r.step for r in panel.records] == list(range(1, other.steps + 1))


def test_what_the_thread_raises_is_raised_by_wait_once(make):
    panel = make(train_set=Clips(broken=range(7)))
    panel.buttons["start"].click()
    assert eventually(lambda: "header is damaged" in panel.status.value), "for who looks at it"
    with pytest.raises(DataError, match="header is damaged"):
        panel.wait(timeout=PATIENCE)
    assert panel.wait()


def test_fresh_removes_the_run_and_nothing_else(make, tmp_path):
    run_to(4, make())
    for name, content in (("note.txt", "mine"), ("trackers.json", "{}")):
        (tmp_path / "run" / name).write_text(content)
    remove_run(tmp_path / "nothing")
    fresh = make(fresh=True)
    assert fresh.steps == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["note.txt"]
    run_to(1, fresh)


def test_an_interrupt_ends_the_wait_and_pauses_the_run(make):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    panel = run_to(1, make())
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            panel.wait(timeout=PATIENCE)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert eventually(lambda: panel.paused)


def test_a_picture_that_fails_costs_no_checkpoint(make, tmp_path, monkeypatch):
    panel = run_to(2, make())
    monkeypatch.setattr(TrainingPanel, "draw", lambda panel, figure: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        panel.stop()
    assert last(tmp_path / "run")["step"] == panel.steps
