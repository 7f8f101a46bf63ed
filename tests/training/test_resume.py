"""A run that was stopped and resumed equals one that never stopped, to the bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.training import load_checkpoint, train
from tests.training.helpers import Clips, assert_same_state, config, fit, history, last

SETTINGS = ["model.dropout=0.3", "training.num_epochs=3", "training.valid_clips=3"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken")
    records = fit(config(*SETTINGS), path)
    assert [record.step for record in records] == list(range(1, 10))  # 7 clips: 3 steps an epoch
    return path, records


@pytest.mark.law
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])
def test_resume_at_any_step_equals_never_stopped(unbroken, tmp_path, stop):
    path, records = unbroken
    first = fit(config(*SETTINGS), tmp_path, steps=stop)
    assert last(tmp_path)["step"] == stop
    second = fit(config(*SETTINGS), tmp_path, resume=True)
    assert [r.loss for r in first + second] == [r.loss for r in records]
    assert [r.valid for r in first + second] == [r.valid for r in records]
    assert_same_state(path, tmp_path)
    assert history(path) == history(tmp_path)


@pytest.mark.law
def test_resume_with_accumulation_and_another_state_of_the_world(tmp_path):
    """What the caller does to the global generators between two steps changes nothing."""
    cfg = config("model.dropout=0.3", "training.accumulation_steps=2", "training.num_epochs=3")
    records = fit(cfg, tmp_path / "a", train_set=Clips(11))
    assert len(records) == 9  # 5 rounds an epoch: 2 + 2 + 1
    for _ in range(9):
        torch.manual_seed(random.randrange(1000))
        torch.rand(3)
        np.random.rand(3)
        resume = (tmp_path / "b").exists()
        fit(cfg, tmp_path / "b", steps=1, train_set=Clips(11), resume=resume)
    assert_same_state(tmp_path / "a", tmp_path / "b")
    assert history(tmp_path / "a") == history(tmp_path / "b")


@pytest.mark.law
def test_more_steps_later_equals_more_steps_at_once(unbroken, tmp_path):
    """The validation that a cut-off run makes at its end leaves no trace when it goes on."""
    path, _ = unbroken
    records = fit(config(*SETTINGS, "training.num_steps=4"), tmp_path)
    assert records[-1].valid is not None
    assert history(tmp_path)[-1]["final"]
    fit(config(*SETTINGS), tmp_path, resume=True)
    assert_same_state(path, tmp_path)
    assert history(path) == history(tmp_path)


@pytest.mark.law
def test_workers_change_nothing(unbroken, tmp_path):
    path, _ = unbroken
    fit(config(*SETTINGS, "training.num_workers=2"), tmp_path)
    assert_same_state(path, tmp_path)


@pytest.mark.law
def test_resume_does_not_read_what_came_before(tmp_path):
    cfg = config("training.num_epochs=1", "training.batch_size=1")
    fit(cfg, tmp_path, steps=4)
    clips = Clips()
    fit(cfg, tmp_path, resume=True, train_set=clips)
    assert len(clips.read) == 3


@pytest.mark.law
def test_global_state_is_left_alone(tmp_path):
    def seed():
        for start in (torch.manual_seed, random.seed, np.random.seed):
            start(3)

    seed()
    expected = torch.rand(2), random.random(), np.random.rand()
    seed()
    run = train(config("training.deterministic=true"), Clips(), None, tmp_path, device="cpu")
    next(run)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(2), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    run.close()


@pytest.mark.law
@pytest.mark.parametrize("moment", ["reading", "writing", "exporting"])
def test_killed_process_resumes_to_the_same_weights(unbroken, tmp_path, moment):
    """SIGKILL while a clip is read, while a checkpoint is written, while model/ is exported."""
    path, _ = unbroken
    settings = [*SETTINGS, "training.checkpoint_every=2"]
    command = [sys.executable, "-m", "tests.training.helpers", str(tmp_path), moment, *settings]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert last(tmp_path)["step"] == {"reading": 4, "writing": 2, "exporting": 2}[moment]
    fit(config(*settings), tmp_path, resume=True)
    assert_same_state(path, tmp_path)
    assert history(path) == history(tmp_path)
    left = [p.name for p in tmp_path.rglob("*") if p.name.startswith(".")]
    assert not left, "temporary files of the killed run"
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.law
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["train", "valid"])
def test_signal_stops_between_two_steps(unbroken, tmp_path, number, where):
    """Within a step or a validation; the step's record is not lost, only later."""
    path, records = unbroken

    class Signalling(Clips):
        def __getitem__(self, index):
            # The first clip of the second step, or of the second validation, which has two batches.
            if len(self.read) == self.when:
                os.kill(os.getpid(), number)
            return super().__getitem__(index)

    train_set, valid_set = Signalling(), Signalling(3, seed=1)
    train_set.when = 2 if where == "train" else None
    valid_set.when = 3 if where == "valid" else None
    before = signal.getsignal(number)
    seen = []
    run = train(config(*SETTINGS), train_set, valid_set, tmp_path, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        seen.extend(iter(lambda: next(run), None))
    assert signal.getsignal(number) is before
    assert last(tmp_path)["step"] == len(seen) + 1 == (2 if where == "train" else 6)
    seen += fit(config(*SETTINGS), tmp_path, resume=True)
    assert [(r.loss, r.valid) for r in seen] == [(r.loss, r.valid) for r in records]
    assert_same_state(path, tmp_path)
    assert history(path) == history(tmp_path)


@pytest.mark.law
def test_signal_in_the_callers_code_saves_too(tmp_path):
    run = train(config(), Clips(), None, tmp_path, device="cpu")
    next(run)
    next(run)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    run.close()
    assert last(tmp_path)["step"] == 2


def test_runs_in_another_thread(tmp_path):
    records = []
    thread = threading.Thread(target=lambda: records.extend(fit(config(), tmp_path)))
    thread.start()
    thread.join()
    assert len(records) == 6


def test_a_folder_goes_on_with_its_own_run_only(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoints/last\.pt to resume"):
        fit(config(), tmp_path, resume=True)
    assert not list(tmp_path.iterdir())
    fit(config(), tmp_path, steps=1)
    with pytest.raises(CheckpointError, match="--resume"):
        fit(config(), tmp_path)
    changes = "training.lr=0.01", "model.base_channels=8", "sde.type=ouve", "training.seed=3"
    with pytest.raises(CheckpointError, match=r"sde\.type was bbed, is ouve.* and \d more"):
        fit(config(*changes), tmp_path, resume=True)
    fit(config("training.num_epochs=1", "training.log_every=5"), tmp_path, resume=True)


# SIGKILL at random moments: what is left can be read and gone on from, to the bit.


def go_on(folder):
    """Start the run, or resume it: what a user's restart script does."""
    resume = (folder / "checkpoints" / "last.pt").exists()
    fit(config(*SETTINGS, "training.checkpoint_every=1"), folder, resume=resume)


def lines(folder):
    """How far a run has come: lines of its history, of steps and validations."""
    path = folder / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.law
@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_random_kills(unbroken, tmp_path, kills):
    """Moments are drawn in lines of history, so that they differ however slow the machine is."""
    rng, done, runs, places = random.Random(kills), 0, 0, set()
    total, folder = lines(unbroken[0]), tmp_path / "run0"
    while done < kills:
        here = lines(folder)
        moment = rng.randint(here, min(here + total // 2, total))
        process = get_context("fork").Process(target=go_on, args=(folder,))
        process.start()
        while process.exitcode is None and lines(folder) < moment:
            process.join(0.002)
        process.join(rng.uniform(0, 0.05))
        if process.exitcode is None:
            process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster: begin another run
            assert_same_state(unbroken[0], folder)
            runs += 1
            folder = tmp_path / f"run{runs}"
            continue
        assert process.exitcode == -signal.SIGKILL
        done += 1
        for file in folder.glob("checkpoints/*.pt"):
            places.add((file.name, load_checkpoint(file)["step"]))
        copy = tmp_path / "copy"
        if folder.exists():
            shutil.copytree(folder, copy)
        go_on(copy)
        assert_same_state(unbroken[0], copy)
        assert history(unbroken[0]) == history(copy)
        assert not list(copy.rglob(".*"))
        shutil.rmtree(copy)
    assert len(places) > min(kills, 8) // 4, "the kills must come at different moments"
