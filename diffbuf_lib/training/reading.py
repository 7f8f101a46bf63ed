"""Batches from a dataset, with an error that names the file.

An exception in a DataLoader worker reaches the main process as a string of a traceback; here it
travels as a value instead and is raised as the one-line DataError that it was.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

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
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (mix, target), each [B, C, T] float32, of every batch of indices.

    Args:
        dataset: where the clips come from.
        batches: lists of dataset indices, one list a batch.
        num_workers: processes that read ahead; 0 reads in this process.
        seed: of the workers' own generators (clips are keyed by index and do not use them).
        pin_memory: for faster copies to a GPU.

    Raises:
        DataError: a clip cannot be read, or a reading process died; names the clip.
    """
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
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
            try:
                item = next(iterator)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                names = ", ".join(dataset.name(index) for index in indices)
                raise DataError(
                    f"a process that reads clips died near {names}: lower training.num_workers (0 "
                    "reads in the main process) or free memory, /dev/shm too"
                ) from error
            if isinstance(item, _Failure):
                raise item.error()
            yield item
    finally:
        del iterator  # ends the workers now: a kept traceback would keep them alive with it


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

    def __init__(self, dataset: ClipSource) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> Any:
        items = []
        for index in indices:
            try:
                items.append(self.dataset[index])
            except Exception as error:
                return _failure(error, self.dataset.name(index))
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
