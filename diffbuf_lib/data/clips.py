"""What all datasets share: the crop, the padding, the checks of a pair, the random key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffbuf_lib.data.files import AudioInfo, check_rate, read_audio, read_info
from diffbuf_lib.errors import DataError


class Crop(NamedTuple):
    """Which samples make up a clip: zeros, then a part of the file, then zeros up to the chunk.

    Attributes:
        zeros: zero samples before the file's.
        start: first sample of the file.
        frames: samples of the file; 0 if the clip ends before the file begins.
    """

    zeros: int
    start: int
    frames: int


def draw_crop(
    length: int, chunk_size: int, leading_zeros: int = 0, rng: np.random.Generator | None = None
) -> Crop:
    """Choose a clip from a file that has `leading_zeros` zero samples put before it.

    The offset is uniform in 0 .. leading_zeros + max(length, chunk_size) - chunk_size.

    Args:
        length: of the file, samples.
        chunk_size: of the clip, samples.
        leading_zeros: samples; (K - 1) hops, so that training sees the start of a stream.
        rng: draws the offset; None takes the file from its start, without leading zeros.

    Returns:
        The crop; zeros + frames is at most `chunk_size`.
    """
    if rng is None:
        return Crop(0, 0, min(length, chunk_size))
    offset = int(rng.integers(leading_zeros + max(length - chunk_size, 0) + 1))
    zeros = min(max(leading_zeros - offset, 0), chunk_size)
    start = max(offset - leading_zeros, 0)
    return Crop(zeros, start, min(length - start, chunk_size - zeros))


def apply_crop(path: Path, crop: Crop, chunk_size: int) -> Tensor:
    """Read a crop of an audio file.

    Args:
        path: an audio file that has the crop's samples.
        crop: which samples.
        chunk_size: length of the result, samples.

    Returns:
        [C, T] float32 with T = `chunk_size`, full scale 1.

    Raises:
        DataError: as in `read_audio`.
    """
    wave, _ = read_audio(path, crop.start, max(crop.frames, 1))
    wave = wave[:, : crop.frames]
    after = chunk_size - crop.zeros - crop.frames
    return torch.nn.functional.pad(wave, (crop.zeros, after))


class ClipDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """Pairs (mix, target) of clips of one length; what is below `root` is a subclass's matter.

    What item `i` is depends on (seed, epoch, i) only: not on the order of reading, on other items,
    on workers, or on any global random state.

    Args:
        root: the dataset's folder.
        chunk_size: samples of a clip (audio.chunk_size).
        sample_rate: Hz (audio.sample_rate); files of another rate are refused.
        training: crop at random; else from the start and without leading zeros.
        seed: of the crops (training.seed).
        leading_zeros: zero samples put before each file in training.

    Raises:
        DataError: no such folder, nothing in it, an incomplete pair, or another layout than this
            class reads; the message names what is missing and the --dataset_type that fits.
    """

    def __init__(
        self,
        root: str | Path,
        chunk_size: int = 16000,
        *,
        sample_rate: int = 16000,
        training: bool = True,
        seed: int = 0,
        leading_zeros: int = 0,
    ) -> None:
        if chunk_size < 1:
            raise DataError(f"chunk_size {chunk_size} is below 1 sample: raise audio.chunk_size")
        if seed < 0 or leading_zeros < 0:
            raise DataError(
                f"seed {seed} and leading_zeros {leading_zeros} must not be negative: "
                "change training.seed or diffusion_buffer.leading_zeros"
            )
        self.root = Path(root)
        self.chunk_size = chunk_size
        self.sample_rate = sample_rate
        self.training = training
        self.seed = seed
        self.leading_zeros = leading_zeros if training else 0
        # In shared memory, so that worker processes which outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._lengths: dict[int, int] = {}  # samples of the items whose headers have been checked
        if not self.root.is_dir():
            raise DataError(
                f"dataset folder {self.root} does not exist: check the path, or make the data with "
                "`diffbuf data demo` or `diffbuf data build`"
            )
        self.items: Sequence[tuple[Path, ...]] = self._find()

    @property
    def epoch(self) -> int:
        """The epoch whose crops are read."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops are read; workers that already run follow.

        Args:
            epoch: 0 or more. Set it before a DataLoader's iterator is made.

        Raises:
            DataError: a negative epoch.
        """
        if epoch < 0:
            raise DataError(f"epoch {epoch} is negative: count epochs from 0")
        self._epoch.fill_(epoch)

    def name(self, i: int) -> str:
        """Return the files of item `i`, for error messages."""
        return " + ".join(str(path) for path in self.items[self._index(i)])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Read item `i`.

        Returns:
            mix, target: [C, T] float32 each, T = chunk_size, full scale 1.

        Raises:
            IndexError: no such item.
            DataError: a file cannot be read, or the files of the pair do not match; the message
                names them.
        """
        index = self._index(i)
        epoch = self.epoch if self.training else 0
        return self._load(index, np.random.default_rng([self.seed, epoch, index]))

    @abstractmethod
    def _find(self) -> Sequence[tuple[Path, ...]]:
        """List the files of every item."""

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Read an item whose files are (mix, target): one crop for both."""
        mix, target = self.items[index]
        if index not in self._lengths:
            self._lengths[index] = self.check_pair(read_info(mix), read_info(target))
        crop = draw_crop(
            self._lengths[index],
            self.chunk_size,
            self.leading_zeros,
            rng if self.training else None,
        )
        return apply_crop(mix, crop, self.chunk_size), apply_crop(target, crop, self.chunk_size)

    def check_pair(self, mix: AudioInfo, target: AudioInfo) -> int:
        """Check that two files belong together, and return their length in samples."""
        for what, ours, theirs, fix in (
            ("Hz", mix.sample_rate, target.sample_rate, "resample one of them"),
            ("channels", mix.channels, target.channels, "bring both to one number of channels"),
            ("samples", mix.frames, target.frames, "cut both to the same length"),
        ):
            if ours != theirs:
                raise DataError(
                    f"{mix.path} has {ours} {what} but {target.path} has {theirs}: {fix}"
                )
        check_rate(mix, self.sample_rate)
        return mix.frames

    def _index(self, i: int) -> int:
        """Return an index from 0, as lists understand negative ones."""
        index = i + len(self) if i < 0 else i
        if not 0 <= index < len(self):
            raise IndexError(f"item {i} of a dataset of {len(self)}")
        return index


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack items into a batch, for a DataLoader.

    Args:
        items: pairs (mix, target), each [C, T] float32.

    Returns:
        mix, target: [B, C, T] float32 each.

    Raises:
        DataError: items of different shapes; bring the files to one number of channels.
    """
    shapes = sorted({tuple(wave.shape) for item in items for wave in item})
    if len(shapes) > 1:
        counts = sorted({shape[0] for shape in shapes})
        if len(counts) > 1:
            raise DataError(
                f"a batch holds clips of {' and '.join(map(str, counts))} channels: convert the "
                "files to one number of channels, or set training.batch_size=1"
            )
        lengths = " and ".join(str(shape[1]) for shape in shapes)
        raise DataError(f"a batch holds clips of {lengths} samples: use one audio.chunk_size")
    mix, target = zip(*items, strict=True)
    return torch.stack(mix), torch.stack(target)
