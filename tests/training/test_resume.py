"""A run that was stopped and resumed equals one that never stopped, to the bit."""

import os
import random
import signal
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from diffbuf_lib.training import train
from tests.conftest import refused
from tests.training.helpers import Clips, assert_same_run, config, fit, history, last

SETTINGS = ["model.dropout=0.3", "training.num_epochs=3", "training.valid_clips=3"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken")
    records = fit(config(*SETTINGS), path)
    assert [record.step for record in records] == list(range(1, 10))  # 7 clips: 3 steps an epoch
    return path, records


def numbers(records):
    return [(record.loss, record.valid) for record in records]


@pytest.mark.law
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])
def test_resume_at_any_step_equals_never_stopped(unbroken, tmp_path, stop):
    path, records = unbroken
    first = fit(config(*SETTINGS), tmp_path, steps=stop)
    assert last(tmp_path)["step"] == stop
    second = fit(config(*SETTINGS), tmp_path, resume=True)
    assert numbers(first + second) == numbers(records)
    assert_same_run(path, tmp_path)


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
        fit(cfg, tmp_path / "b", steps=1, train_set=Clips(11), resume="auto")
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.law
def test_more_steps_later_equals_more_steps_at_once(unbroken, tmp_path):
    """The validation that a cut-off run makes at its end leaves no trace when it goes on."""
    records = fit(config(*SETTINGS, "training.num_steps=4"), tmp_path)
    assert records[-1].valid is not None
    assert history(tmp_path)[-1]["final"]
    fit(config(*SETTINGS), tmp_path, resume=True)
    assert_same_run(unbroken[0], tmp_path)


@pytest.mark.law
def test_workers_change_nothing(unbroken, tmp_path):
    fit(config(*SETTINGS, "training.num_workers=2"), tmp_path)
    assert_same_run(unbroken[0], tmp_path)


@pytest.mark.law
def test_resume_does_not_read_what_came_before(tmp_path):
    cfg, clips = config("training.num_epochs=1", "training.batch_size=1"), Clips()
    fit(cfg, tmp_path, steps=4)
    fit(cfg, tmp_path, resume=True, train_set=clips)
    assert len(clips.read) == 3


@pytest.mark.law
def test_global_state_is_left_alone(tmp_path):
    def draw_after(make_a_step):
        for start in (torch.manual_seed, random.seed, np.random.seed):
            start(3)
        make_a_step()
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    run = train(config("training.deterministic=true"), Clips(), None, tmp_path, device="cpu")
    assert draw_after(lambda: next(run)) == draw_after(lambda: None)
    assert not torch.are_deterministic_algorithms_enabled()
    run.close()


KILLED = [*SETTINGS, "training.checkpoint_every=2"]


def go_on_until_killed(folder, moment, times):
    """Train until SIGKILL before a clip is read, or a file is synchronised or takes its name."""
    left = iter(range(times, -1, -1))

    def reach(*names):
        if moment in ("any", *names) and next(left, 1) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call):
        return lambda *args: (reach(*(Path(str(arg)).name for arg in args)), call(*args))[1]

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, watched(getattr(os, name)))
    clips = Clips(on_read=lambda index: reach("clip"))
    fit(config(*KILLED), folder, train_set=clips, resume="auto")


@pytest.mark.law
@pytest.mark.parametrize(
    ("moment", "times"),
    # last.pt is there of steps 0 and 2; model/ is complete, but not yet there
    [("clip", 11), ("last.pt", 2), (".model.new", 0)]
    + [pytest.param("any", n, marks=pytest.mark.slow) for n in range(48)],
)
def test_killed_process_resumes_to_the_same_weights(unbroken, tmp_path, moment, times):
    """Killed twice: the second time it may be at its end by then."""
    for _ in range(2):
        args = tmp_path, moment, times
        process = get_context("fork").Process(target=go_on_until_killed, args=args)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL or (tmp_path / "model").is_dir()
    fit(config(*KILLED), tmp_path, resume="auto")
    assert_same_run(unbroken[0], tmp_path)
    left = [p.name for p in tmp_path.rglob("*") if p.name.startswith(".")]
    assert not left, "temporary files of the killed run"
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.law
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("where", "clip", "step"), [("train", 2, 2), ("valid", 3, 6), ("", 0, 2)])
def test_signal_stops_between_two_steps(unbroken, tmp_path, number, where, clip, step):
    """Within a step or a validation or between them; a step's record is not lost, only later."""
    path, records = unbroken
    sets = {"train": Clips(), "valid": Clips(3, seed=1)}
    if where:  # at the first clip of the second step, or of the second validation of two batches
        read = sets[where].read
        sets[where].on_read = lambda index: len(read) == clip and signal.raise_signal(number)
    before, seen = signal.getsignal(number), []
    run = train(config(*SETTINGS), sets["train"], sets["valid"], tmp_path, device="cpu")

    def handed_out():
        for record in run:
            yield record
            if not where and record.step == step:
                signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        seen.extend(handed_out())
    run.close()
    assert signal.getsignal(number) is before
    assert last(tmp_path)["step"] == step == len(seen) + bool(where)
    seen += fit(config(*SETTINGS), tmp_path, resume=True)
    assert numbers(seen) == numbers(records)
    assert_same_run(path, tmp_path)


def test_a_folder_goes_on_with_its_own_run_only(tmp_path):
    refused(lambda: fit(config(), tmp_path, resume=True), "last.pt", "--resume")
    assert not list(tmp_path.iterdir())
    fit(config(), tmp_path, steps=1)
    refused(lambda: fit(config(), tmp_path), "--resume")
    changes = "training.lr=0.01", "model.base_channels=8", "sde.type=ouve", "training.seed=3"
    refused(lambda: fit(config(*changes), tmp_path, resume=True), "sde.type was bbed, is ouve")
    refused(lambda: fit(config("training.seed=3"), tmp_path, resume=True), "training.seed was 0")
    fit(config("training.num_epochs=1", "training.log_every=5"), tmp_path, resume=True)
