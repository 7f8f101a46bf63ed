"""Datasets of (mix, target) clips: what all share, and the layouts of --dataset_type."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import ConcatDataset, Dataset

from diffbuf_lib.config import Config
from diffbuf_lib.data import audio
from diffbuf_lib.data.audio import AudioInfo, check_rate, list_audio, read_audio, read_info
from diffbuf_lib.data.mixing import is_silent, mix_pair, reverberate, tilt_spectrum
from diffbuf_lib.errors import DataError
from diffbuf_lib.registry import LAYOUTS

_TRIES = 20  # excerpts drawn before a file counts as silent


def open_dataset(
    dataset_type: int | str, root: str | Path, cfg: Config, *, training: bool
) -> ClipDataset:
    """Open a folder of `LAYOUTS[dataset_type]` as the config says; training crops at random.

    Shards are recognised as such, in a folder or at a URL such as s3://bucket/train. Raises
    ConfigError for another dataset_type, DataError for a folder that does not fit it.
    """
    if "://" in str(root) or (Path(root) / "index.npy").is_file():
        dataset_type = "shards"
    layout: type[ClipDataset] = LAYOUTS[dataset_type].load()
    return layout(
        root,
        cfg.audio.chunk_size,
        sample_rate=cfg.audio.sample_rate,
        training=training,
        seed=cfg.training.seed,
        leading_zeros=cfg.leading_zero_samples,
        pair_tolerance=cfg.data.pair_tolerance,
        attenuation=cfg.data.attenuation,
        **layout.options(cfg),
    )


def open_datasets(
    dataset_type: int, roots: str | Path | Sequence[str | Path], cfg: Config, *, training: bool
) -> ClipDataset:
    """Open one folder, or several as one; DataError for none."""
    roots = [roots] if isinstance(roots, str | Path) else roots
    if not roots:
        raise DataError("no dataset folder is given: check --data_path and --valid_path")
    parts = [open_dataset(dataset_type, root, cfg, training=training) for root in roots]
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)


def find_layout(root: Path) -> Any | None:
    """Return the dataset_type that fits a folder; None if none does."""
    return next((entry.name for entry in LAYOUTS.values() if entry.load().fits(root)), None)


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack items (mix, target), [C, T] each, into a batch of [B, C, T] each, for a DataLoader.

    DataError for items of different shapes.
    """
    shapes = {tuple(wave.shape) for item in items for wave in item}
    for axis, what, fix in (
        (0, "channels", "give the files the same number of channels, or set training.batch_size=1"),
        (1, "samples", "use one audio.chunk_size"),
    ):
        sizes = sorted({shape[axis] for shape in shapes})
        if len(sizes) > 1:
            raise DataError(f"a batch holds clips of {' and '.join(map(str, sizes))} {what}: {fix}")
    mix, target = zip(*items, strict=True)
    return torch.stack(mix), torch.stack(target)


class ClipDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs (mix, target) of clips of one length; subclasses define the layout below `root`.

    Item `i` depends on (seed, epoch, i) only: not on the order of reading or on workers. DataError
    for a folder that is missing, empty or of another layout; it names the --dataset_type that fits.
    """

    holds: str  # what a folder of this layout has in it, for error messages
    parts: tuple[str, ...] = ()  # patterns of the folders in it

    def __init__(
        self,
        root: str | Path,  # the dataset's folder
        chunk_size: int = 16000,  # samples of a clip (audio.chunk_size)
        *,
        sample_rate: int = 16000,  # Hz (audio.sample_rate); files of another rate are refused
        training: bool = True,  # crop at random; else from the start, without leading zeros
        seed: int = 0,  # of everything drawn (training.seed)
        leading_zeros: int = 0,  # zero samples put before each file in training
        pair_tolerance: int = 400,  # samples by which a pair's lengths may differ
        attenuation: float = 0.0,  # dB by which a training clip may be lowered (data.attenuation)
    ) -> None:
        if chunk_size < 1:
            raise DataError(f"chunk_size {chunk_size} is below 1 sample: raise audio.chunk_size")
        self.root, self.chunk_size, self.sample_rate = Path(root), chunk_size, sample_rate
        self.training, self.seed = training, seed
        self.leading_zeros = leading_zeros if training else 0
        self.pair_tolerance = pair_tolerance
        self.attenuation = attenuation if training else 0.0
        self._trimmed = False  # whether the warning about trimmed pairs was given
        # In shared memory, so that worker processes which outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._lengths: dict[int, int] = {}  # samples of the items whose headers have been checked
        self.items: Sequence[tuple[Path, ...]] = self._open()

    @classmethod
    def fits(cls, root: Path) -> bool:
        """Return whether a folder looks like one of this layout."""
        return bool(cls.parts) and all(any(root.glob(part)) for part in cls.parts)

    @staticmethod
    def options(cfg: Config) -> dict[str, Any]:
        """Return the arguments beyond those of `ClipDataset` that a config sets."""
        return {}

    def _open(self) -> Sequence[tuple[Path, ...]]:
        if not self.root.is_dir():
            raise DataError(f"dataset folder {self.root} does not exist: see `diffbuf data --help`")
        if not self.fits(self.root) or not (items := self._find()):
            raise self._nothing_found()
        return items

    def _find(self) -> Sequence[tuple[Path, ...]]:
        """List the files of every item of a folder that fits."""
        raise NotImplementedError

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Read an item whose files are (mix, target): one crop for both."""
        mix, target = self.items[index]
        if index not in self._lengths:
            self._lengths[index] = self.check_pair(read_info(mix), read_info(target))
        length, zeros = self._lengths[index], self.leading_zeros
        crop = draw_crop(length, self.chunk_size, zeros, rng if self.training else None)
        return apply_crop(mix, crop, self.chunk_size), apply_crop(target, crop, self.chunk_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; set it before a DataLoader's iterator is made."""
        self._epoch.fill_(epoch)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Fetch the items that will be asked for next, if fetching takes a while."""

    def name(self, i: int) -> str:
        """Return the files of item `i`, for error messages."""
        return " + ".join(str(path) for path in self.items[i])

    def label(self, i: int) -> str:
        """Return the name of item `i` in tables: its path below noisy/ or speech/."""
        path = self.items[i][0].relative_to(self.root)
        return _text(Path(*(path.parts[1:] or path.parts)))

    def length(self, i: int) -> int:
        """Return the full length of item `i` in samples; warn if a header promises another."""
        return self.check_pair(*(read_info(path, decode=True) for path in self.items[i]))

    def read(self, i: int, frames: int) -> list[Tensor]:
        """Return the first samples of item `i`, not cut to a chunk: mix and target, [C, T]."""
        return [read_audio(path, 0, frames)[0] for path in self.items[i]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Read item `i`: mix and target, [C, T] float32 each, T = chunk_size, full scale 1.

        DataError if a file cannot be read, or the files of the pair do not match.
        """
        index = range(len(self))[i]  # from 0
        epoch = int(self._epoch) if self.training else 0
        rng = np.random.default_rng([self.seed, epoch, index])
        mix, target = self._load(index, rng)
        if self.attenuation:
            gain = 10 ** (-rng.uniform(0, self.attenuation) / 20)
            mix, target = gain * mix, gain * target
        return mix, target

    def check_pair(self, mix: AudioInfo, target: AudioInfo) -> int:
        """Check that two files belong together, and return their length in samples."""
        difference = abs(mix.frames - target.frames)  # encoders add or drop a few samples
        for what, ours, theirs, fix in (
            ("Hz", mix.sample_rate, target.sample_rate, "resample one of them"),
            ("channels", mix.channels, target.channels, "give both the same number of channels"),
            ("samples", mix.frames, target.frames, "cut them alike, or raise data.pair_tolerance"),
        ):
            if ours != theirs and (what != "samples" or difference > self.pair_tolerance):
                has = f"{mix.path} has {ours} {what} but {target.path} has {theirs}"
                raise DataError(f"{has}: {fix}")
        check_rate(mix, self.sample_rate)
        if difference and not self._trimmed:
            self._trimmed = True
            has = f"{mix.path} has {mix.frames} samples and {target.path} {target.frames}"
            limit = f"data.pair_tolerance is {self.pair_tolerance}"
            warnings.warn(f"{has}: such pairs are trimmed to the shorter ({limit})", stacklevel=2)
        return min(mix.frames, target.frames)

    def _nothing_found(self) -> DataError:
        """Explain why a folder does not fit this layout, and what would."""
        here = f"{self.root} has no {self.holds}"
        number = find_layout(self.root)  # not this one, unless it is empty
        if number and not isinstance(self, LAYOUTS[number].load()):
            other = LAYOUTS[number].load().holds
            return DataError(f"{here}, but {other}: use --dataset_type {number}")
        for split in (self.root / name for name in ("train", "valid", "test")):
            if find_layout(split):
                return DataError(f"{here}: its splits are one level down, so use {split}")
        return DataError(f"{here}: check the path, or make the data with `diffbuf data build`")


class JoinedDataset(ClipDataset):
    """Several datasets, one after the other."""

    def __init__(self, datasets: Sequence[ClipDataset]) -> None:
        self.datasets = datasets
        self.joined: ConcatDataset[tuple[Tensor, Tensor]] = ConcatDataset(datasets)
        self.items = [files for dataset in datasets for files in dataset.items]

    def name(self, i: int) -> str:
        """Return what item `i` is called in its dataset."""
        dataset, index = self._place(i)
        return dataset.name(index)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Let every dataset fetch its own items."""
        places = [self._place(i) for i in indices]
        for dataset in self.datasets:
            if mine := [index for owner, index in places if owner is dataset]:
                dataset.prefetch(mine)

    def _place(self, i: int) -> tuple[ClipDataset, int]:
        number = bisect_right(self.joined.cumulative_sizes, i)
        return self.datasets[number], i - [0, *self.joined.cumulative_sizes][number]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of all datasets."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Read item `i`, counted over all datasets."""
        return self.joined[i]


@LAYOUTS.register(1)
class DNLMDataset(ClipDataset):
    """One split of DN-LM: `sample_*/mixture.wav` is the mix, `sample_*/vocals.wav` the target."""

    holds = "sample_*/ folders with mixture.wav and vocals.wav (DN-LM)"
    parts = ("sample_*/",)

    def _find(self) -> Sequence[tuple[Path, ...]]:
        folders = sorted(path for path in self.root.glob("sample_*") if path.is_dir())
        return [(_stem(folder, "mixture"), _stem(folder, "vocals")) for folder in folders]

    def label(self, i: int) -> str:
        """Return the sample's folder."""
        return _text(self.items[i][0].parent.relative_to(self.root))


def _stem(folder: Path, stem: str) -> Path:
    wanted = {f"{stem}{extension}" for extension in audio.EXTENSIONS}
    found = [path for path in folder.iterdir() if path.name.lower() in wanted]
    if len(found) != 1:
        names = " and ".join(sorted(path.name for path in found))
        has = f"both {names}" if found else f"no {stem}.wav (or .flac)"
        raise DataError(f"{folder} has {has}: let it have one, or remove the folder")
    return found[0]


def _text(path: Path) -> str:
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


@LAYOUTS.register(2)
class PairedFolderDataset(ClipDataset):
    """`noisy/NAME` is the mix and `clean/NAME` the target, at any depth, for every NAME."""

    holds = "clean/ and noisy/ folders with files of equal names"
    parts = ("clean/", "noisy/")

    def _find(self) -> Sequence[tuple[Path, ...]]:
        clean, noisy = (_by_name(self.root / name) for name in ("clean", "noisy"))
        for ours, theirs, missing in ((clean, noisy, "noisy"), (noisy, clean, "clean")):
            if alone := sorted(set(ours) - set(theirs)):
                more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
                names = ", ".join(alone[:3]) + more
                raise DataError(f"{self.root / missing} lacks {names}: add or remove files")
        return [(noisy[name], clean[name]) for name in sorted(clean)]


def _by_name(folder: Path) -> dict[str, Path]:
    files = ((path.relative_to(folder), path) for path in list_audio(folder))
    return {name.with_suffix(name.suffix.lower()).as_posix(): path for name, path in files}


@LAYOUTS.register(3)
class MixingDataset(ClipDataset):
    """Files below `speech/` mixed with excerpts of those below `noise/`, by the DN-LM recipe.

    Every speech file is one item; all else is drawn, keyed by (seed, epoch, index). Validation
    mixes as in epoch 0 and takes speech from the start of the file, unless that is silent. The SNR
    is that of the whole chunk, before leading zeros push its end out. Rooms are impulse responses
    drawn from the files below `rooms/`, direct sound at sample 0.
    """

    holds = "speech/ and noise/ folders, mixed while training"
    parts = ("speech/", "noise/")

    def __init__(
        self,
        root: str | Path,
        chunk_size: int = 16000,
        *,
        snr: tuple[float, float] = (-30.0, 0.0),  # lowest and highest, dB (data.snr_min, snr_max)
        distance: tuple[float, float] = (5.0, 20.0),  # nearest and farthest talker, m
        speed: float = 0.0,  # largest change of the speech's speed and pitch (data.speed)
        tilt: float = 0.0,  # largest tilt of its spectrum, either way, dB per octave (data.tilt)
        room_probability: float = 0.0,  # share of clips that go through a room
        **shared: Any,  # the other arguments of `ClipDataset`
    ) -> None:
        if not snr[0] <= snr[1]:
            raise DataError(f"snr {snr[0]} is above {snr[1]} dB: lower data.snr_min")
        self.snr, self.distance, self.speed, self.tilt = snr, distance, speed, tilt
        self.room_probability = room_probability
        super().__init__(root, chunk_size, **shared)

    @staticmethod
    def options(cfg: Config) -> dict[str, Any]:
        """Return the arguments that the config's section `data` sets."""
        data = cfg.data
        found = {name: getattr(data, name) for name in ("speed", "tilt", "room_probability")}
        found["snr"] = (data.snr_min, data.snr_max)
        return found | {"distance": (data.distance_min, data.distance_max)}

    def _find(self) -> Sequence[tuple[Path, ...]]:
        names = ("speech", "noise", "rooms") if self.room_probability else ("speech", "noise")
        found: dict[str, list[Path]] = {"rooms": []}
        for folder in (self.root / name for name in names):
            found[folder.name] = list_audio(folder) if folder.is_dir() else []
            if not found[folder.name]:
                fix = ", or set data.room_probability=0" if folder.name == "rooms" else ""
                raise DataError(f"{folder} holds no .wav or .flac file: add some{fix}")
        self.noise_files, self.room_files = found["noise"], found["rooms"]
        return [(path,) for path in found["speech"]]

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        (speech_file,) = self.items[index]
        noise_file = self.noise_files[int(rng.integers(len(self.noise_files)))]
        snr_db, distance = float(rng.uniform(*self.snr)), float(rng.uniform(*self.distance))
        faster = 1 + float(rng.uniform(-self.speed, self.speed)) if self.speed else 1.0
        length = round(faster * self.chunk_size)
        speech, zeros = self._excerpt(speech_file, length, rng, is_speech=True)
        speech = self._augment(audio.resample(speech, length, self.chunk_size), rng)
        noise, _ = self._excerpt(noise_file, self.chunk_size, rng, is_speech=False)
        if len(speech) != len(noise):
            counts = f"{speech_file} has {len(speech)} channels but {noise_file} has {len(noise)}"
            raise DataError(f"{counts}: give both the same number")
        mixture = mix_pair(speech, noise, snr_db, distance)
        # Zeros are added last: the SNR is that of the whole chunk, however much of it remains.
        mix, target = (pad(wave, (zeros, 0))[:, : self.chunk_size] for wave in mixture[:2])
        return mix, target

    def _augment(self, speech: Tensor, rng: np.random.Generator) -> Tensor:
        if self.room_files and rng.random() < self.room_probability:
            path = self.room_files[int(rng.integers(len(self.room_files)))]
            check_rate(read_info(path), self.sample_rate)
            speech = reverberate(speech, read_audio(path)[0][0])
        if self.tilt:
            speech = tilt_spectrum(speech, self.sample_rate, rng.uniform(-self.tilt, self.tilt))
        return speech

    def _excerpt(
        self, path: Path, length: int, rng: np.random.Generator, *, is_speech: bool
    ) -> tuple[Tensor, int]:
        """Return an excerpt that is not silent, [C, length], and the zeros to put before it."""
        info = read_info(path)
        check_rate(info, self.sample_rate)
        if not is_speech and info.frames < length:  # short speech is padded
            short = f"{path} has {info.frames} samples, a clip has {length}"
            raise DataError(f"{short}: remove it or lower audio.chunk_size")
        for attempt in range(_TRIES):
            from_start = is_speech and attempt == 0 and not self.training
            zeros = self.leading_zeros if is_speech else 0
            crop = draw_crop(info.frames, length, zeros, None if from_start else rng)
            whole = crop._replace(zeros=0, frames=min(info.frames - crop.start, length))
            if not is_silent(wave := apply_crop(path, whole, length)):
                return wave, crop.zeros
        raise DataError(f"{path} is silent in {_TRIES} drawn excerpts: remove it")


class Crop(NamedTuple):
    """Which samples make up a clip: zeros, then a part of the file, then zeros up to the chunk."""

    zeros: int  # before the file's samples
    start: int  # first sample of the file
    frames: int  # samples of the file; 0 if the clip ends before the file begins


def draw_crop(
    length: int, chunk_size: int, leading_zeros: int = 0, rng: np.random.Generator | None = None
) -> Crop:
    """Choose `chunk_size` samples of a file of `length` with `leading_zeros` put before it.

    The offset is uniform in 0 .. leading_zeros + max(length, chunk_size) - chunk_size. Without
    `rng`, the file is taken from its start, without leading zeros.
    """
    if rng is None:
        return Crop(0, 0, min(length, chunk_size))
    offset = int(rng.integers(leading_zeros + max(length - chunk_size, 0) + 1))
    zeros = min(max(leading_zeros - offset, 0), chunk_size)
    start = max(offset - leading_zeros, 0)
    return Crop(zeros, start, min(length - start, chunk_size - zeros))


def apply_crop(path: Path, crop: Crop, chunk_size: int) -> Tensor:
    """Read a crop from an audio file that contains it: [C, chunk_size] float32, full scale 1."""
    return place_crop(read_audio(path, crop.start, max(crop.frames, 1))[0], crop, chunk_size)


def place_crop(wave: Tensor, crop: Crop, chunk_size: int) -> Tensor:
    """Put a crop's samples, [C, T], at their position in the chunk."""
    return pad(wave[:, : crop.frames], (crop.zeros, chunk_size - crop.zeros - crop.frames))
