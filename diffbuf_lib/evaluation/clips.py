"""The clips that are scored: each at its own length, with a name and a checksum."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data import ClipDataset, open_dataset, read_info
from diffbuf_lib.data.audio import text_of
from diffbuf_lib.data.datasets import Crop, apply_crop
from diffbuf_lib.errors import DataError
from diffbuf_lib.training.metrics import SILENCE_RMS
from diffbuf_lib.training.plan import Stream, example_generators


@dataclass(frozen=True)
class Clip:
    """One clip, averaged to mono.

    Attributes:
        index: its place in the dataset.
        name: of its file or folder, below the dataset's root.
        mix: [T] float32, full scale 1, the noisy signal.
        target: [T] float32, the clean signal.
    """

    index: int
    name: str
    mix: Tensor
    target: Tensor

    @property
    def snr(self) -> float | None:
        """10 log10 of the energies of target and mix - target, dB; None if either is silent."""
        speech, noise = self.target.double(), (self.mix - self.target).double()
        if min(wave.square().mean().sqrt() for wave in (speech, noise)) < SILENCE_RMS:
            return None
        ratio = float(speech.square().sum() / noise.square().sum())
        return 10 * math.log10(ratio) if 0 < ratio < math.inf else None

    @property
    def checksum(self) -> str:
        """12 hexadecimal digits of its samples: equal clips have equal ones, wherever they lie."""
        digest = hashlib.sha256(self.mix.contiguous().numpy().tobytes())
        digest.update(self.target.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


class Clips:
    """A dataset folder read clip by clip, whole files unless `seconds` says otherwise.

    Args:
        dataset_type: 1, 2 or 3, as in training. Clips of type 3 are mixed when they are read, all
            of one length.
        root: the dataset's folder.
        cfg: the model's config; its rate is the one that files must have.
        seconds: length at most; None for whole files (type 3: audio.chunk_size).
        limit: only the first so many clips; None for all.

    Raises:
        DataError: as in `open_dataset`; or `seconds` or `limit` is not above 0.
    """

    def __init__(
        self,
        dataset_type: int,
        root: str | Path,
        cfg: Config,
        seconds: float | None = None,
        limit: int | None = None,
    ) -> None:
        self.rate = cfg.audio.sample_rate
        if seconds is not None and not 1 <= seconds * self.rate < math.inf:
            raise DataError(f"--seconds {seconds} is no length of a clip: give seconds above 0")
        if limit is not None and limit < 1:
            raise DataError(f"--limit {limit} leaves no clip: give 1 or more")
        self.at_most = None if seconds is None else round(seconds * self.rate)
        self.dataset = _open(dataset_type, root, cfg, self.at_most)
        self.whole = dataset_type != 3
        self.indices = range(min(len(self.dataset), limit or len(self.dataset)))
        self.names = [_name(self.dataset, dataset_type, i) for i in self.indices]
        self.lengths = [self._length(i) for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Clip:
        """Read clip `i`; DataError if a file cannot be read or the two do not match."""
        if self.whole:
            crop = Crop(0, 0, self.lengths[i])
            mix, target = (
                apply_crop(path, crop, self.lengths[i]) for path in self.dataset.items[i]
            )
        else:
            mix, target = self.dataset[i]
        return Clip(i, self.names[i], mix.mean(0), target.mean(0))

    def batches(self, clips: int, seconds: float = 100.0) -> list[list[int]]:
        """Split the clips into batches of like lengths, shortest first.

        Args:
            clips: in a batch at most.
            seconds: of audio in a batch at most; a longer clip is a batch of its own.
        """
        order = sorted(self.indices, key=lambda i: self.lengths[i])
        batches: list[list[int]] = [[]]
        for i in order:
            padded = (len(batches[-1]) + 1) * self.lengths[i]  # the newest is the longest
            if batches[-1] and (len(batches[-1]) == clips or padded > seconds * self.rate):
                batches.append([])
            batches[-1].append(i)
        return batches

    def _length(self, i: int) -> int:
        if not self.whole:
            return self.dataset.chunk_size
        mix, target = (read_info(path, decode=True) for path in self.dataset.items[i])
        frames = self.dataset.check_pair(mix, target)
        return min(frames, self.at_most or frames)


def clip_generators(
    indices: Sequence[int], seed: int, device: torch.device
) -> list[torch.Generator]:
    """Return a source of diffusion noise a clip: the same whatever batch the clip is in."""
    return example_generators([(i,) for i in indices], seed, Stream.VALID, device)


def pad_batch(waves: Sequence[Tensor]) -> Tensor:
    """Stack [T] signals of several lengths as [B, 1, T], with silence behind the shorter ones.

    The silence is what a stream's end is to the model: it changes no sample before.
    """
    return torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True).unsqueeze(1)


def _open(dataset_type: int, root: str | Path, cfg: Config, samples: int | None) -> ClipDataset:
    if samples is not None:
        # Only audio is read here, so a clip may be shorter than the model's buffer.
        audio = cfg.audio.model_copy(update={"chunk_size": samples})
        cfg = cfg.model_copy(update={"audio": audio})
    return open_dataset(dataset_type, root, cfg, training=False)


def _name(dataset: ClipDataset, dataset_type: int, i: int) -> str:
    path = dataset.items[i][0].relative_to(dataset.root)
    if dataset_type == 1:
        return text_of(path.parent)
    return text_of(Path(*path.parts[1:]))  # without noisy/ or speech/
