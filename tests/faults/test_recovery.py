"""What a run does about a bad batch, too little memory, a dead reader and a second run."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffbuf_lib.diagnostics.capsule import Capsule
from diffbuf_lib.errors import CheckpointError, DataError, OutOfMemoryError
from diffbuf_lib.training import memory, train
from diffbuf_lib.training.folder import FolderLock
from tests.conftest import refused
from tests.training.helpers import (
    Clips,
    Hooked,
    assert_same_run,
    clip_of,
    config,
    fit,
    history,
    last,
    same,
)

SKIP = ["training.on_nonfinite=skip", "training.batch_size=1", "training.num_epochs=1"]


@pytest.mark.law
def test_skipped_batch_changes_nothing_and_is_counted(tmp_path):
    cfg, clips = config(*SKIP, "training.checkpoint_every=1"), Clips(bad=[clip_of(3)])
    fit(cfg, tmp_path, steps=2, train_set=clips)
    before = last(tmp_path)
    with pytest.warns(UserWarning, match="left out, 1 of at most 10: step 3"):
        (record,) = fit(cfg, tmp_path, steps=1, train_set=clips, resume=True)
    after = last(tmp_path)
    assert (record.step, record.skipped, record.bad_batches) == (3, True, 1)
    for name in ("model", "ema", "optimizer"):
        assert same(before[name], after[name]), name
    rest = fit(cfg, tmp_path, train_set=clips, resume=True)
    assert [(r.bad_batches, r.skipped) for r in rest] == [(1, False)] * 4
    lines = [line for line in history(tmp_path) if "loss" in line]
    assert [line["bad_batches"] for line in lines] == [0, 0, 1, 1, 1, 1, 1]
    assert lines[2]["loss"] is None
    assert not same(after["model"], last(tmp_path)["model"])
    assert all(value.isfinite().all() for value in last(tmp_path)["model"].values())


def test_too_many_skipped_batches_end_the_run_also_after_a_resume(tmp_path):
    cfg = config(*SKIP, "training.max_skipped=2")
    clips = {"train_set": Clips(bad=[clip_of(i) for i in (1, 4, 6)]), "valid_set": None}
    with pytest.warns(UserWarning, match="left out"):
        fit(cfg, tmp_path, steps=4, **clips)
    refused(lambda: fit(cfg, tmp_path, resume=True, **clips), "step 6 ", "training.max_skipped")


@pytest.mark.law
@pytest.mark.filterwarnings("ignore:left out")
def test_resume_with_skipped_batches_is_exact(tmp_path):
    cfg = config(*SKIP[:2], "training.num_epochs=2", "model.dropout=0.3")
    clips = {"train_set": Clips(bad=[1, 5]), "valid_set": None}
    fit(cfg, tmp_path / "a", **clips)
    for steps in (3, 5, None):
        fit(cfg, tmp_path / "b", steps=steps, resume="auto", **clips)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def hungry():
    """A model that asks for 4 TB a clip: the allocator really refuses."""
    return Hooked(config(), before=lambda mix: torch.empty(len(mix), 10**12))


def test_out_of_memory_says_what_was_asked_and_what_fits_and_replays(tmp_path):
    cfg = config("training.batch_size=4")
    with pytest.raises(OutOfMemoryError) as caught:
        fit(cfg, tmp_path, valid_set=None, model=hungry())
    for part in ("4 clips of 4000", "16000000000000 bytes", "about 3 would fit",
                 "training.batch_size", "--find_batch_size", "Capsule: "):  # fmt: skip
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert last(tmp_path)["step"] == 0
    capsule = Capsule.load(next(tmp_path.glob("capsule_*")))
    result = capsule.replay(model=hungry())
    assert result.reproduced
    for error in (result.error, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        assert memory.is_out_of_memory(error)
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))
    result = capsule.replay()  # the library's own model is not hungry
    assert not result.reproduced
    assert result.finding is None


@pytest.mark.law
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_search_of_the_largest_batch(first, ceiling, limit):
    """It fits, is within an eighth of the largest that does, and takes few trials."""
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    found = memory.largest(fits, min(first, ceiling), ceiling)
    best = min(limit, ceiling)
    assert (found is None) == (best == 0)
    if found is not None:
        assert best * 8 / 9 - 1 <= found <= best
        assert found in tried
    assert len(tried) <= 14
    assert max(tried) <= ceiling


def test_batch_size_on_a_cpu_is_what_memory_allows(monkeypatch):
    cfg = config("training.batch_size=8")
    estimate = memory.estimate_step(cfg)
    for clips, size in ((3, 3), (50, 8)):
        monkeypatch.setattr(memory, "free_memory", lambda device, n=clips: estimate.total(n))
        assert memory.find_batch_size(cfg, Clips(9), "cpu") == size
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    refused(lambda: memory.find_batch_size(cfg, Clips(9), "cpu"), "model.base_channels")


@pytest.mark.law
def test_killed_reader_names_the_file_it_was_reading(tmp_path):
    deadly = Clips(on_read=lambda index: index == 5 and os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"died at clip_005\.wav: lower training\.num_workers"):
        fit(config("training.num_workers=2"), tmp_path, train_set=deadly, valid_set=None)


@pytest.mark.law
def test_reader_that_dies_in_mid_step_is_no_fault_of_the_step(tmp_path):
    """Torch raises a reader's death from a signal handler, wherever the main process is."""

    def read(index):
        (tmp_path / f"reader-{os.getpid()}").touch()
        time.sleep(60 if len(clips.read) > 2 else 0)

    def kill_and_wait(mix):
        (reader,) = tmp_path.glob("reader-*")
        os.kill(int(reader.name.partition("-")[2]), signal.SIGKILL)
        for _ in range(100):
            time.sleep(0.05)

    clips, model = Clips(on_read=read), Hooked(config(), before=kill_and_wait)
    with pytest.raises(DataError, match=r"died (at|near) clip_00\d\.wav"):
        fit(config("training.num_workers=1"), tmp_path / "run", train_set=clips, model=model)
    assert not list((tmp_path / "run").glob("capsule_*"))


def test_two_runs_in_one_folder(tmp_path):
    first = train(config(), Clips(), None, tmp_path, device="cpu")
    next(first)
    refused(lambda: fit(config(), tmp_path, resume=True), "in use", os.getpid())
    first.close()
    assert not (tmp_path / ".lock").exists()
    assert len(fit(config(), tmp_path, resume=True)) == 5


def take(folder):
    lock = FolderLock(folder)
    lock.acquire()
    return lock


@pytest.mark.law
def test_lock_ends_with_its_process(tmp_path):
    holder = get_context("fork").Process(target=lambda: (take(tmp_path), time.sleep(60)))
    holder.start()
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=f"process {holder.pid}"):
        take(tmp_path)
    holder.kill()
    holder.join()
    assert (tmp_path / ".lock").exists()
    lock = take(tmp_path)
    lock.release()
    lock.release()


@pytest.mark.law
def test_forked_reader_does_not_hold_the_lock(tmp_path):
    lock = take(tmp_path)
    child = get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    lock.release()
    take(tmp_path)
    child.kill()
    child.join()


@pytest.mark.law
def test_lock_is_taken_by_one_of_many(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        tries = [pool.submit(take, tmp_path) for _ in range(8)]
    errors = [each.exception() for each in tries]
    assert errors.count(None) == 1
    assert all(error is None or isinstance(error, CheckpointError) for error in errors)


def test_resume_with_a_smaller_set_turns_to_the_next_epoch(tmp_path):
    """Found by fuzzing: no batch is left of the epoch that the checkpoint stands in."""
    fit(config(), tmp_path, steps=2)
    records = fit(config(), tmp_path, resume=True, train_set=Clips(2))
    assert [(r.step, r.epoch) for r in records] == [(3, 1)]
