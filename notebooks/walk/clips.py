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
        count: how many clips an epoch has; None for as many as there are.
    """

    def __init__(self, clips: ClipSource, count: int | None = None) -> None:
        self.clips = clips
        self.count = len(clips) if count is None or not len(clips) else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        return self.clips[index % len(self.clips)]

    def name(self, index: int) -> str:
        """Return what error messages call a clip."""
        return self.clips.name(index % len(self.clips))

    def set_epoch(self, epoch: int) -> None:
        """Set what random crops are keyed by."""
        self.clips.set_epoch(epoch)
