"""Batches from a dataset, with an error that names the file.

An exception in a DataLoader worker reaches the main process as a string of a traceback; here it
travels as a value instead and is raised as the one-line DataError that it was.
"""

from __future__ import annotations

import os
import re
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

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


def read_batches(
    dataset: ClipSource,
    batches: Sequence[Sequence[int]],
    *,
    num_workers: int = 0,
    seed: int = 0,
    pin_memory: bool = False,
    in_flight: InFlight | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (mix, target), each [B, C, T] float32, of every batch of indices.

    Args:
        dataset: where the clips come from.
        batches: lists of dataset indices, one list a batch.
        num_workers: processes that read ahead; 0 reads in this process.
        seed: of the workers' own generators (clips are keyed by index and do not use them).
        pin_memory: for faster copies to a GPU.
        in_flight: is kept up to date, for whoever hears of a reader's death elsewhere: torch
            raises it from a signal handler, wherever the main process is.

    Raises:
        DataError: a clip cannot be read, or a reading process died; names the clip.
    """
    in_flight = InFlight() if in_flight is None else in_flight
    in_flight.begin(dataset, num_workers)
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset, in_flight.readers),
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
            in_flight.batch = indices
            try:
                item = next(iterator)
            except RuntimeError as error:
                if (death := in_flight.death(error)) is None:
                    raise
                raise death from error
            if isinstance(item, _Failure):
                raise item.error()
            yield item
    finally:
        del iterator  # ends the workers now: a kept traceback would keep them alive with it


class InFlight:
    """Who reads which clip: names the file when a reading process dies."""

    def __init__(self) -> None:
        self.dataset: ClipSource | None = None
        self.batch: Sequence[int] = ()
        self.readers: torch.Tensor | None = None  # [W, 2] process id and clip, -1 between clips

    def begin(self, dataset: ClipSource, num_workers: int) -> None:
        """Forget earlier readers."""
        self.dataset, self.batch = dataset, ()
        self.readers = torch.full((num_workers, 2), -1).share_memory_() if num_workers else None

    def death(self, error: BaseException) -> DataError | None:
        """Return what to raise for torch's message of a reader's death; None for another error."""
        if "DataLoader worker" not in str(error) or self.dataset is None:
            return None
        dead = [int(pid) for pid in re.findall(r"\d+", str(error).partition("pid")[2])]
        readers = [] if self.readers is None else self.readers.tolist()
        clips = [clip for pid, clip in readers if pid in dead and clip >= 0]
        names = ", ".join(self.dataset.name(i) for i in clips or self.batch)
        return DataError(
            f"a process that reads clips died {'at' if clips else 'near'} {names}: lower "
            "training.num_workers (0 reads in the main process) or free memory, /dev/shm too"
        )


@dataclass(frozen=True)
class _Failure:
    """An exception on its way out of a worker."""

    message: str
    details: str | None  # a traceback, where the error is not a plain DataError

    def error(self) -> DataError:
        error = DataError(self.message)
        if self.details:
            error.add_note(self.details)
        return error


class _Guarded(Dataset[Any]):
    """A dataset of batches in which an unreadable clip is a value, not an exception."""

    def __init__(self, dataset: ClipSource, readers: torch.Tensor | None) -> None:
        self.dataset, self.readers = dataset, readers

    def __getitem__(self, indices: Sequence[int]) -> Any:
        items = []
        worker = get_worker_info()
        for index in indices:
            if worker is not None and self.readers is not None:
                self.readers[worker.id] = torch.tensor([os.getpid(), index])
            try:
                items.append(self.dataset[index])
            except Exception as error:
                return _failure(error, self.dataset.name(index))
        if worker is not None and self.readers is not None:
            self.readers[worker.id, 1] = -1
        try:
            return collate(items)
        except Exception as error:
            return _failure(error, ", ".join(self.dataset.name(index) for index in indices))


def _failure(error: Exception, names: str) -> _Failure:
    if isinstance(error, DataError):
        text = str(error)
        named = any(part in text for part in names.split(" + "))
        return _Failure(text if named else f"{names}: {text}", None)
    reason = " ".join(str(error).split())
    return _Failure(f"{names}: {type(error).__name__}: {reason}", traceback.format_exc())


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Keep a worker alive at Ctrl-C, which a terminal sends to it too, until it is told to end.

    A forked worker also inherits the run's SIGTERM handler, which would not let it end at all.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unchanged(item: Any) -> Any:
    """Return the batch as the dataset made it (a lambda would not reach spawned workers)."""
    return item
