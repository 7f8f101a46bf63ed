"""What a run does about a bad batch, too little memory, a dead reader and a second run."""

import os
import signal
import threading
import time
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffbuf_lib.data import open_dataset
from diffbuf_lib.data.audio import write_audio
from diffbuf_lib.diagnostics.capsule import Capsule
from diffbuf_lib.errors import CheckpointError, DataError, NonFiniteError, OutOfMemoryError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import memory, train
from diffbuf_lib.training.folder import FolderLock
from tests.training.helpers import (
    Clips,
    assert_same_state,
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
    model = DiffusionBufferModel(config())
    run = train(
        config(*SKIP, "training.checkpoint_every=1"), Clips(bad=[clip_of(3)]), None, tmp_path,
        device="cpu", model=model,
    )  # fmt: skip
    next(run)
    next(run)
    before = last(tmp_path)
    with pytest.warns(UserWarning, match="left out, 1 of at most 10: step 3"):
        record = next(run)
    after = last(tmp_path)
    assert (record.step, record.skipped, record.bad_batches) == (3, True, 1)
    for name in ("model", "ema", "optimizer"):
        assert same(before[name], after[name]), name
    rest = list(run)
    assert [r.bad_batches for r in rest] == [1] * 4
    assert not any(r.skipped for r in rest)
    lines = history(tmp_path)
    assert [line["bad_batches"] for line in lines] == [0, 0, 1, 1, 1, 1, 1]
    assert lines[2]["loss"] is None
    assert not same(after["model"], last(tmp_path)["model"])
    assert all(p.isfinite().all() for p in model.parameters())


def test_too_many_skipped_batches_end_the_run_also_after_a_resume(tmp_path):
    cfg = config(*SKIP, "training.max_skipped=2", "training.checkpoint_every=1")
    clips = Clips(bad=[clip_of(i) for i in (1, 4, 6)])
    with pytest.warns(UserWarning, match="left out"):
        fit(cfg, tmp_path, steps=4, train_set=clips, valid_set=None)
    with pytest.raises(NonFiniteError, match=r"step 6 .* 2 batches were left out before, and "):
        fit(cfg, tmp_path, train_set=clips, valid_set=None, resume=True)


@pytest.mark.law
@pytest.mark.filterwarnings("ignore:left out")
def test_resume_with_skipped_batches_is_exact(tmp_path):
    cfg = config(*SKIP[:2], "training.num_epochs=2", "model.dropout=0.3")
    clips = {"train_set": Clips(bad=[1, 5]), "valid_set": None}
    fit(cfg, tmp_path / "a", **clips)
    for steps in (3, 5, None):
        fit(cfg, tmp_path / "b", steps=steps, resume=(tmp_path / "b").exists(), **clips)
    assert_same_state(tmp_path / "a", tmp_path / "b")
    assert history(tmp_path / "a") == history(tmp_path / "b")


class Hungry(DiffusionBufferModel):
    """Asks for 4 TB a clip beyond `room` clips: the allocator really refuses."""

    room = 0

    def forward(self, mix, target=None, **randomness):
        if len(mix) > self.room:
            torch.empty(len(mix) - self.room, 10**12)
        return super().forward(mix, target, **randomness)


def test_out_of_memory_says_what_was_asked_and_what_fits_and_replays(tmp_path):
    cfg = config("training.batch_size=4")
    with pytest.raises(OutOfMemoryError) as caught:
        fit(cfg, tmp_path, valid_set=None, model=Hungry(cfg))
    message = str(caught.value)
    for part in ("step 1 (epoch 0)", "4 clips of 4000", "16000000000000 bytes", "about 3 would fit",
                 "training.batch_size", "--find_batch_size", "Capsule: "):  # fmt: skip
        assert part in message
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert last(tmp_path)["step"] == 0
    capsule = Capsule.load(next(tmp_path.glob("capsule_*")))
    result = capsule.replay(model=Hungry(config()))
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
    with pytest.raises(OutOfMemoryError, match=r"not even one clip.*model\.base_channels"):
        memory.find_batch_size(cfg, Clips(9), "cpu")


@pytest.mark.law
def test_killed_reader_names_the_file_it_was_reading(tmp_path):
    class Deadly(Clips):
        def __getitem__(self, index):
            if index == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r"died at clip_005\.wav: lower training\.num_workers"):
        fit(config("training.num_workers=2"), tmp_path, train_set=Deadly(), valid_set=None)


@pytest.mark.law
def test_reader_that_dies_in_mid_step_is_no_fault_of_the_step(tmp_path):
    """Torch raises a reader's death from a signal handler, wherever the main process is."""

    class Waiting(DiffusionBufferModel):
        def forward(self, *args, **options):
            pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
            os.kill(pids[0], signal.SIGKILL)
            for _ in range(100):
                time.sleep(0.05)
            return super().forward(*args, **options)

    class Telling(Clips):
        def __getitem__(self, index):
            with open(tmp_path / "pids", "a") as file:
                file.write(f"{os.getpid()}\n")
            if len(self.read) > 2:
                time.sleep(60)
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r"died (at|near) clip_00\d\.wav"):
        fit(
            config("training.num_workers=1"), tmp_path / "run", train_set=Telling(),
            valid_set=None, model=Waiting(config()),
        )  # fmt: skip
    assert not list((tmp_path / "run").glob("capsule_*"))


def test_two_runs_in_one_folder(tmp_path):
    first = train(config(), Clips(), None, tmp_path, device="cpu")
    next(first)
    with pytest.raises(CheckpointError, match=rf"in use by another run \(process {os.getpid()}\)"):
        fit(config(), tmp_path, resume=True)
    first.close()
    assert not (tmp_path / ".lock").exists()
    assert len(fit(config(), tmp_path, resume=True)) == 5


def _hold(folder, ready):
    lock = FolderLock(folder)
    lock.acquire()
    ready.set()
    time.sleep(60)


@pytest.mark.law
def test_lock_ends_with_its_process(tmp_path):
    context = get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(CheckpointError, match=f"process {holder.pid}"):
        FolderLock(tmp_path).acquire()
    holder.kill()
    holder.join()
    assert (tmp_path / ".lock").exists()
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
    lock.release()


@pytest.mark.law
def test_forked_reader_does_not_hold_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    child = get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    lock.release()
    FolderLock(tmp_path).acquire()
    child.kill()
    child.join()


@pytest.mark.law
def test_lock_is_taken_by_one_of_many(tmp_path):
    got, locks = [], [FolderLock(tmp_path) for _ in range(8)]

    def take(lock):
        try:
            lock.acquire()
            got.append(lock)
        except CheckpointError:
            pass

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_resume_with_a_smaller_set_turns_to_the_next_epoch(tmp_path):
    """Found by fuzzing: no batch is left of the epoch that the checkpoint stands in."""
    fit(config(), tmp_path, steps=2)
    records = fit(config(), tmp_path, resume=True, train_set=Clips(2))
    assert [(r.step, r.epoch) for r in records] == [(3, 1)]


@pytest.mark.parametrize("when", ["before", "in mid-epoch"])
def test_damaged_file_is_named(tmp_path, when):
    for i in range(4):
        (tmp_path / f"sample_{i:05}").mkdir()
        for name in ("mixture.wav", "vocals.wav"):
            write_audio(tmp_path / f"sample_{i:05}" / name, 0.1 * torch.randn(1, 4000), 16000)
    clips = open_dataset(1, tmp_path, config(), training=True)
    run = train(config(), clips, None, tmp_path / "run", device="cpu")
    if when == "in mid-epoch":
        next(run)
    for file in tmp_path.glob("*/mixture.wav"):
        file.write_bytes(b"RIFF\x10\x00\x00\x00" + bytes(range(100)))
    with pytest.raises(DataError, match=r"mixture\.wav") as caught:
        list(run)
    assert "\n" not in str(caught.value)
