"""A part of a dataset, or a small one repeated: an epoch of a notebook's run takes seconds."""

from __future__ import annotations

from torch import Tensor

from diffbuf_lib.training.feed import ClipSource


class FirstClips:
    """The first clips of a dataset, as one that training can use.

    A dataset of fewer clips is gone through again: an epoch of one step would validate and save
    after every step.

    Args:
        clips: the dataset.
        count: how many clips an epoch has.
    """

    def __init__(self, clips: ClipSource, count: int) -> None:
        self._clips, self._count = clips, count

    def __len__(self) -> int:
        return self._count if len(self._clips) else 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        return self._clips[index % len(self._clips)]

    def name(self, index: int) -> str:
        """Return what error messages call a clip."""
        return self._clips.name(index % len(self._clips))

    def set_epoch(self, epoch: int) -> None:
        """Set what the random crops are keyed by."""
        self._clips.set_epoch(epoch)
