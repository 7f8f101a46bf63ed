"""Which examples make up which batch, and how they are read: all a function of (seed, epoch).

No state has to be saved: the order of an epoch, the noise of the example at a position of that
order and the dropout of a step are seeded from their names. So they depend neither on the batch
size, nor on the number of processes, nor on where a run was stopped and resumed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from diffbuf_lib.config import TrainingConfig
from diffbuf_lib.data import collate
from diffbuf_lib.errors import DataError


class ClipSource(Protocol):
    """What training asks of a dataset; `diffbuf_lib.data` has the real ones."""

    def __len__(self) -> int:
        """Return the number of clips."""

    def __getitem__(self, index: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (mix, target), each [C, T] float32, full scale 1."""

    def name(self, index: int, /) -> str:
        """Return what error messages call a clip, such as its folder."""

    def set_epoch(self, epoch: int, /) -> None:
        """Set what the random crops are keyed by."""


@dataclass(frozen=True)
class Batch:
    """One process's part of a round."""

    mix: torch.Tensor  # [B, C, T] float32, full scale 1
    target: torch.Tensor  # [B, C, T] float32, full scale 1
    generators: list[torch.Generator]  # B of them on the model's device, one an example


class Feed:
    """One process's batches in the order of the plan, read ahead within an epoch.

    Args:
        plan: which clips make up which batch.
        training: for `num_workers` and the seed.
        train_set: the clips.
        device: where batches go, and where the model draws its noise.
        rank: which process this is.
    """

    def __init__(
        self,
        plan: EpochPlan,
        training: TrainingConfig,
        train_set: ClipSource,
        device: torch.device,
        rank: int,
    ) -> None:
        self.plan, self.training, self.train_set = plan, training, train_set
        self.device, self.rank = device, rank
        self.readers = Readers()
        self._batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    def batch(self, epoch: int, round_: int) -> Batch:
        """Return the batch of a round; ask for the rounds of an epoch in their order.

        Raises:
            DataError: a clip cannot be read; names it.
        """
        if self._batches is None:
            self.train_set.set_epoch(epoch)
            self._batches = read_batches(
                self.train_set,
                self.plan.batches(epoch, self.rank, start=round_),
                num_workers=self.training.num_workers,
                seed=stream_seed(self.training.seed, Stream.WORKERS, epoch, self.rank),
                pin_memory=self.device.type == "cuda",
                readers=self.readers,
            )
        mix, target = next(self._batches)
        keys = [(epoch, position) for position in self.plan.positions(round_, self.rank)]
        return Batch(
            mix.to(self.device, non_blocking=True),
            target.to(self.device, non_blocking=True),
            example_generators(keys, self.training.seed, Stream.EXAMPLE, self.device),
        )

    def stop(self) -> None:
        """End the processes that read ahead; the next batch may be of any epoch and round."""
        self._batches = None


class Stream(IntEnum):
    """What a seed is for: two streams never share one, whatever their other numbers are."""

    WEIGHTS = 0
    ORDER = 1
    EXAMPLE = 2
    STEP = 3
    VALID = 4
    WORKERS = 5


def stream_seed(seed: int, stream: Stream, *key: int) -> int:
    """Return a 64-bit seed for a draw, named by `key`, of one stream of one run."""
    sequence = np.random.SeedSequence([seed, int(stream), *key])
    return int(sequence.generate_state(1, np.uint64)[0])


def example_generators(
    keys: Sequence[tuple[int, ...]], seed: int, stream: Stream, device: torch.device
) -> list[torch.Generator]:
    """Return a generator on `device` for each key: (epoch, position), or in validation (clip,)."""
    return [torch.Generator(device).manual_seed(stream_seed(seed, stream, *key)) for key in keys]


def seed_everything(seed: int, stream: Stream, *key: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python, for dropout and such."""
    value = stream_seed(seed, stream, *key)
    torch.manual_seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


@dataclass(frozen=True)
class EpochPlan:
    """How one epoch is cut into batches, over all processes.

    A batch is one model call of one process; `processes` batches side by side are a round, and
    `accumulation` rounds (fewer at the end of the epoch) are one optimizer step. A last round
    that is not full is dropped, except when the whole set is smaller than one round: then the
    only round holds all of it in smaller batches.

    Raises:
        DataError: the training set is empty.
    """

    size: int  # examples in the training set
    batch_size: int  # examples of a batch
    accumulation: int  # rounds whose gradients make one step
    processes: int  # how many processes train
    seed: int  # `training.seed`

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError("the training set holds no clip: check the path of the training data")

    @property
    def rounds(self) -> int:
        """Rounds of an epoch, at least 1."""
        return max(1, self.size // (self.batch_size * self.processes))

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch, at least 1."""
        return -(-self.rounds // self.accumulation)

    @property
    def examples_per_round(self) -> int:
        """Examples that all processes together take in one round."""
        return min(self.batch_size * self.processes, self.size)

    def positions(self, round_: int, rank: int) -> list[int]:
        """Return where in the epoch's order the examples of one batch stand.

        Example j of round b on process r of W stands at (b W + r) batch_size + j. So two
        processes with batches of 1 see, together, what one process with batches of 2 sees.
        """
        if self.size >= self.batch_size * self.processes:
            start = (round_ * self.processes + rank) * self.batch_size
            return list(range(start, start + self.batch_size))
        # Fewer examples than one round: equal shares, and where they do not come out even the
        # last process starts again at the front. All processes must have a batch, or the
        # gradient exchange would wait for one that never comes.
        share = -(-self.size // self.processes)
        return [(rank * share + j) % self.size for j in range(share)]

    def order(self, epoch: int) -> list[int]:
        """Return the shuffled indices of the training set in one epoch."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, Stream.ORDER, epoch))
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order

    def batches(self, epoch: int, rank: int, start: int = 0) -> list[list[int]]:
        """Return the dataset indices of one process's batches from round `start` on."""
        order = self.order(epoch)
        rounds = range(start, self.rounds)
        return [[order[position] for position in self.positions(r, rank)] for r in rounds]


def read_batches(
    dataset: ClipSource,
    batches: Sequence[Sequence[int]],
    *,
    num_workers: int = 0,
    seed: int = 0,
    pin_memory: bool = False,
    readers: Readers | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (mix, target), each [B, C, T] float32, of every batch of indices.

    Args:
        dataset: where the clips come from.
        batches: lists of dataset indices, one list a batch.
        num_workers: processes that read ahead; 0 reads in this process.
        seed: of the workers' own generators (clips are keyed by index and do not use them).
        pin_memory: for faster copies to a GPU.
        readers: is kept up to date, for whoever hears of a reader's death.

    Raises:
        DataError: a clip cannot be read, or a reading process died; names the clip.
    """
    readers = Readers() if readers is None else readers
    readers.begin(dataset, num_workers)
    loader: DataLoader[Any] = DataLoader(
        _ReadableBatches(dataset, readers.reading),
        batch_size=None,
        sampler=batches,  # one "index" is a whole batch of indices
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_signals_to_the_main_process if num_workers else None,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=pin_memory,
    )
    iterator = iter(loader)
    try:
        for indices in batches:
            readers.batch = indices
            try:
                item = next(iterator)
            except RuntimeError as error:
                if (death := readers.death(error)) is None:
                    raise
                raise death from error
            if isinstance(item, _Unreadable):
                raise item.error()
            yield item
    finally:
        del iterator  # ends the workers now: a kept traceback would keep them alive with it


class Readers:
    """Who reads which clip, so that the death of a reading process can name the file.

    Torch raises it from a signal handler, wherever the main process is: in mid-step, too.
    """

    def __init__(self) -> None:
        self.dataset: ClipSource | None = None
        self.batch: Sequence[int] = ()
        self.reading: torch.Tensor | None = None  # [W, 2] process id and clip, -1 between clips

    def begin(self, dataset: ClipSource, num_workers: int) -> None:
        """Forget earlier readers."""
        self.dataset, self.batch = dataset, ()
        self.reading = torch.full((num_workers, 2), -1).share_memory_() if num_workers else None

    def death(self, error: BaseException) -> DataError | None:
        """Return what to raise for torch's message of a reader's death; None for another error."""
        if "DataLoader worker" not in str(error) or self.dataset is None:
            return None
        dead = [int(pid) for pid in re.findall(r"\d+", str(error).partition("pid")[2])]
        reading = [] if self.reading is None else self.reading.tolist()
        clips = [clip for pid, clip in reading if pid in dead and clip >= 0]
        names = ", ".join(self.dataset.name(i) for i in clips or self.batch)
        return DataError(
            f"a process that reads clips died {'at' if clips else 'near'} {names}: lower "
            "training.num_workers (0 reads in the main process) or free memory, /dev/shm too"
        )


@dataclass(frozen=True)
class _Unreadable:
    """An exception on its way out of a worker, where torch would make text of its traceback."""

    message: str  # of the DataError
    details: str | None  # a traceback, where the error is not a plain DataError

    def error(self) -> DataError:
        error = DataError(self.message)
        if self.details:
            error.add_note(self.details)
        return error


class _ReadableBatches(Dataset[Any]):
    """A dataset of batches in which an unreadable clip is a value, not an exception."""

    def __init__(self, dataset: ClipSource, reading: torch.Tensor | None) -> None:
        self.dataset, self.reading = dataset, reading

    def __getitem__(self, indices: Sequence[int]) -> Any:
        names = ""
        try:
            items = []
            for index in indices:
                names = self.dataset.name(index)
                self._note(index)
                items.append(self.dataset[index])
            self._note(-1)
            names = ", ".join(self.dataset.name(index) for index in indices)
            return collate(items)
        except DataError as error:
            text = str(error)
            named = any(part in text for part in names.split(" + "))
            return _Unreadable(text if named else f"{names}: {text}", None)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return _Unreadable(f"{names}: {reason}", traceback.format_exc())

    def _note(self, clip: int) -> None:
        worker = get_worker_info()
        if worker is not None and self.reading is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), clip])


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Keep a worker alive at Ctrl-C, which a terminal sends to it too, until it is told to end.

    A forked worker also inherits the run's SIGTERM handler, which would not let it end at all.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unchanged(item: Any) -> Any:
    """Return the batch as the dataset made it (a lambda would not reach spawned workers)."""
    return item
