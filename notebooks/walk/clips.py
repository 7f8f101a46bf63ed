"""A part of a dataset, or a small one repeated: an epoch of a notebook's run takes seconds."""

from __future__ import annotations

from torch import Tensor

from diffbuf_lib.training.feed import ClipSource


class FirstClips:
    """The first `count` clips of a dataset; a dataset with fewer clips is repeated.

    An epoch of one step would validate and save after every step.
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
        """Set the epoch, which seeds the random crops."""
        self.clips.set_epoch(epoch)
