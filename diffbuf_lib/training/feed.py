"""Which examples make up which batch, and how they are read: all a function of (seed, epoch).

The order of an epoch, the noise of the example at a position of that order and the dropout of a
step are seeded from their names. So no state has to be saved, and they depend neither on the batch
size, nor on the number of processes, nor on where a run was resumed.
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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from diffbuf_lib.data import collate
from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import DataError

# Signals that ask a run to stop.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class ClipSource(Protocol):
    """What training needs from a dataset; `diffbuf_lib.data` has the real ones."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (mix, target), each [C, T] float32, full scale 1."""

    def name(self, index: int, /) -> str:
        """Return what error messages call a clip, such as its folder."""

    def set_epoch(self, epoch: int, /) -> None:
        """Set the epoch, which keys the random crops."""


class FixedClips:
    """The first `count` clips of a set, cropped as in epoch 0 and repeated up to `size` clips."""

    def __init__(self, clips: ClipSource, count: int, size: int | None = None) -> None:
        self.clips, self.count = clips, min(count, len(clips))
        self.size = self.count if size is None else size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.clips[index % self.count]

    def name(self, index: int) -> str:
        """As in `ClipSource`."""
        return self.clips.name(index % self.count)

    def set_epoch(self, epoch: int) -> None:
        """Stay in epoch 0."""
        self.clips.set_epoch(0)


class Batch(NamedTuple):
    """One process's part of a round."""

    mix: torch.Tensor  # [B, C, T] float32, full scale 1
    target: torch.Tensor  # [B, C, T] float32, full scale 1
    generators: list[torch.Generator]  # B of them on the model's device, one per example
    share: float = 1.0  # of the step's mean loss, times its number of batches


class Stream(IntEnum):
    """What a seed is for: two streams never share a seed, whatever their keys are."""

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
    `accumulation` rounds (fewer at the end of the epoch) are one optimizer step. Examples beyond
    the last multiple of `unit` (default: one round) are dropped, unless the whole set is smaller
    than one round: then the only round holds all of it in smaller batches.
    DataError for an empty training set.
    """

    size: int  # examples in the training set
    batch_size: int
    accumulation: int  # rounds whose gradients make one step
    processes: int
    seed: int
    unit: int | None = None
    shuffled: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError("the training set holds no clip: check the path of the training data")

    @property
    def a_round(self) -> int:
        """Examples that all processes together take in one round."""
        return self.batch_size * self.processes

    @property
    def global_batch(self) -> int:
        """Examples of a step."""
        return self.a_round * self.accumulation

    @property
    def examples(self) -> int:
        """Examples of an epoch."""
        unit = self.unit or self.a_round
        return self.size // unit * unit or self.size

    @property
    def rounds(self) -> int:
        """Rounds of an epoch, at least 1."""
        return -(-self.examples // self.a_round)

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch, at least 1."""
        return -(-self.rounds // self.accumulation)

    def positions(self, round_: int, rank: int) -> list[int]:
        """Return the positions of one batch's examples in the epoch's order.

        Example j of round b on process r of W: (b W + r) batch_size + j. So two processes with
        batches of 1 see, together, what one process with batches of 2 sees.
        """
        # A set smaller than one round is shared out equally and filled up from its front: all
        # processes must have a batch, or the gradient exchange would wait for ever.
        if self.size < self.a_round:
            share = -(-self.size // self.processes)
            return [i % self.size for i in range(rank * share, (rank + 1) * share)]
        start = round_ * self.a_round + rank * self.batch_size
        return list(range(start, min(start + self.batch_size, self.examples))) or [0]

    def share(self, round_: int, rank: int) -> float:
        """Return a batch's weight in its step's mean: 1, unless the last round is not full."""
        first = round_ // self.accumulation * self.global_batch
        mine = min(self.batch_size, self.examples - round_ * self.a_round - rank * self.batch_size)
        count = min(self.global_batch, self.examples - first)
        if self.size < self.a_round or count % self.a_round == 0:
            return 1.0
        return max(mine, 0) * self.processes * -(-count // self.a_round) / count

    def order(self, epoch: int) -> list[int]:
        """Return the shuffled indices of the training set in one epoch."""
        if not self.shuffled:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(stream_seed(self.seed, Stream.ORDER, epoch))
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order

    def batches(self, epoch: int, rank: int, start: int = 0) -> list[list[int]]:
        """Return the dataset indices of one process's batches from round `start` on."""
        order, rounds = self.order(epoch), range(start, self.rounds)
        return [[order[position] for position in self.positions(r, rank)] for r in rounds]


class ClipReader(Dataset[Any]):
    """Reads batches of clips, in `num_workers` processes that read ahead or (0) in this one."""

    def __init__(self, dataset: ClipSource, num_workers: int = 0) -> None:
        self.dataset, self.num_workers = dataset, num_workers
        # [W, 2] in shared memory: each worker's process id, and the clip that it began last.
        self._begun = torch.full((num_workers, 2), -1).share_memory_() if num_workers else None
        self._over = torch.zeros(()).share_memory_() if num_workers else None

    def read(
        self, batches: Sequence[Sequence[int]], seed: int = 0, *, pin_memory: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (mix, target), each [B, C, T] float32, for every list of dataset indices.

        `seed` is for the workers' own generators (clips are keyed by index and do not use them).
        DataError names a clip that cannot be read, or at which a reading process died.
        """
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_size=None,
            sampler=batches,  # one "index" is a whole batch of indices
            num_workers=self.num_workers,
            worker_init_fn=self._leave_signals_to_the_main_process if self.num_workers else None,
            generator=torch.Generator().manual_seed(seed),
            pin_memory=pin_memory,
        )
        if self._over is not None:
            self._over.zero_()
        iterator = iter(loader)
        try:
            for item in iterator:
                if isinstance(item, DataError):
                    raise item
                yield item
        except RuntimeError as error:
            if (death := self.death(error)) is None:
                raise
            raise death from error
        finally:
            if self._over is not None:
                self._over.fill_(1)
            del iterator  # ends the workers now: a traceback that is kept would keep them alive

    def __getitem__(self, indices: Sequence[int]) -> Any:
        # Return the error of an unreadable clip: torch would turn a raised one into text.
        name, worker = "", get_worker_info()
        try:
            if prefetch := getattr(self.dataset, "prefetch", None):  # shards: all at once
                prefetch(indices)
            items = []
            for index in indices:
                name = self.dataset.name(index)
                if worker is not None and self._begun is not None:
                    self._begun[worker.id] = torch.tensor([os.getpid(), index])
                items.append(self.dataset[index])
            name = ", ".join(self.dataset.name(index) for index in indices)
            return collate(items)
        except Exception as error:
            return clip_error(name, error)

    def _leave_signals_to_the_main_process(self, worker: int) -> None:
        # A terminal sends Ctrl-C to workers too, and a scheduler every signal; and a forked worker
        # has inherited the run's handlers.
        parent = os.getppid()

        def end(*_: object) -> None:
            if self._over or os.getppid() != parent:
                os._exit(1)

        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, end)  # torch ends an unresponsive worker with it

    def death(self, error: BaseException) -> DataError | None:
        """Return the error to raise if torch reports a reader's death; None for another error.

        Torch raises it from a signal handler, wherever the main process is, even within a step.
        """
        if "DataLoader worker" not in str(error) or self._begun is None:
            return None
        dead = re.findall(r"\d+", str(error).partition("pid")[2])
        clips = [clip for pid, clip in self._begun.tolist() if str(pid) in dead]
        names = ", ".join(self.dataset.name(clip) for clip in clips) or "the first clips"
        fix = "lower training.num_workers (0 reads in the main process) or free memory and /dev/shm"
        return DataError(f"a process that reads clips died at {names}: {fix}")


@dataclass(frozen=True)
class Feed:
    """One process's batches, in the plan's order."""

    reader: ClipReader
    plan: EpochPlan
    rank: int  # of the process
    device: torch.device

    def read(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (mix, target) of an epoch's rounds from `start` on, on the CPU."""
        self.reader.dataset.set_epoch(epoch)
        clips = self.plan.batches(epoch, self.rank, start)
        seed = stream_seed(self.plan.seed, Stream.WORKERS, epoch, self.rank)
        return self.reader.read(clips, seed, pin_memory=self.device.type == "cuda")

    def batch(self, waves: Sequence[torch.Tensor], epoch: int, round_: int) -> Batch:
        """Move the waves of a round to the device, with the generators of its noise."""
        mix, target = (wave.to(self.device, non_blocking=True) for wave in waves)
        keys = [(epoch, position) for position in self.plan.positions(round_, self.rank)]
        generators = example_generators(keys, self.plan.seed, Stream.EXAMPLE, self.device)
        return Batch(mix, target, generators, self.plan.share(round_, self.rank))


def clip_error(name: str, error: Exception) -> DataError:
    """Return the error of a clip that cannot be read: one line with its name."""
    if isinstance(error, DataError):
        named = any(part in str(error) for part in name.split(" + "))
        return DataError(str(error) if named else f"{name}: {error}")
    problem = DataError(f"{name}: {type(error).__name__}: {reason(error)}")
    problem.add_note("".join(traceback.format_exception(error)))
    return problem
