"""The three dataset layouts, each giving (mix, target) clips: what --dataset_type chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data.augment import change_speed, reverberate, tilt_spectrum
from diffbuf_lib.data.clips import ClipDataset, Crop, apply_crop, draw_crop
from diffbuf_lib.data.files import EXTENSIONS, check_rate, list_audio, read_audio, read_info
from diffbuf_lib.data.mixing import is_silent, mix_pair
from diffbuf_lib.errors import DataError

LAYOUTS = {
    1: "sample_*/ folders with mixture.wav and vocals.wav (DN-LM)",
    2: "clean/ and noisy/ folders with files of equal names",
    3: "speech/ and noise/ folders, mixed while training",
}
_TRIES = 20  # excerpts drawn before a file counts as silent
_NAMED = 3  # files that an error message names before it only counts


def open_dataset(
    dataset_type: int, root: str | Path, cfg: Config, *, training: bool
) -> ClipDataset:
    """Open a dataset folder with what the config says about audio, crops and SNR.

    Args:
        dataset_type: 1, 2 or 3: see `LAYOUTS`.
        root: the dataset's folder.
        cfg: audio, training.seed, diffusion_buffer.leading_zeros, data.snr_min and data.snr_max.
        training: random crops; else from the start.

    Returns:
        A dataset of (mix, target), [C, T] float32 each.

    Raises:
        DataError: another dataset_type, or a folder that does not fit it.
    """
    kinds: dict[int, Callable[..., ClipDataset]] = {
        1: DNLMDataset,
        2: PairedFolderDataset,
        3: partial(
            MixingDataset,
            snr=(cfg.data.snr_min, cfg.data.snr_max),
            distance=(cfg.data.distance_min, cfg.data.distance_max),
            speed=cfg.data.speed,
            tilt=cfg.data.tilt,
            room_probability=cfg.data.room_probability,
        ),
    }
    if dataset_type not in kinds:
        known = "; ".join(f"{number}: {layout}" for number, layout in LAYOUTS.items())
        raise DataError(f"--dataset_type {dataset_type} is none of {known}")
    return kinds[dataset_type](
        root,
        cfg.audio.chunk_size,
        sample_rate=cfg.audio.sample_rate,
        training=training,
        seed=cfg.training.seed,
        leading_zeros=cfg.leading_zero_samples,
    )


class DNLMDataset(ClipDataset):
    """DN-LM: `sample_*/mixture.wav` is the mix and `sample_*/vocals.wav` the target (or .flac).

    The arguments are those of `ClipDataset`; `root` is one split, such as `DN-LM/train`.
    """

    def _find(self) -> Sequence[tuple[Path, ...]]:
        folders = sorted(path for path in self.root.glob("sample_*") if path.is_dir())
        if not folders:
            raise _nothing_found(self.root, 1)
        return [(_stem(folder, "mixture"), _stem(folder, "vocals")) for folder in folders]


class PairedFolderDataset(ClipDataset):
    """`noisy/NAME` is the mix and `clean/NAME` the target, at any depth, for every NAME.

    The arguments are those of `ClipDataset`. Files that only one of the folders has are an error.
    """

    def _find(self) -> Sequence[tuple[Path, ...]]:
        if not all((self.root / name).is_dir() for name in ("clean", "noisy")):
            raise _nothing_found(self.root, 2)
        clean, noisy = (
            {path.relative_to(folder).as_posix(): path for path in list_audio(folder)}
            for folder in (self.root / "clean", self.root / "noisy")
        )
        for ours, theirs, missing in ((clean, noisy, "noisy"), (noisy, clean, "clean")):
            alone = sorted(set(ours) - set(theirs))
            if alone:
                more = f" and {len(alone) - _NAMED} more" if len(alone) > _NAMED else ""
                raise DataError(
                    f"{self.root / missing} lacks {', '.join(alone[:_NAMED])}{more}: clean/ and "
                    "noisy/ must hold files of equal names, so add or remove them"
                )
        if not clean:
            raise _nothing_found(self.root, 2)
        return [(noisy[name], clean[name]) for name in sorted(clean)]


class MixingDataset(ClipDataset):
    """Files below `speech/` mixed with excerpts of those below `noise/`, by the DN-LM recipe.

    Every speech file is one item; the noise file, both excerpts, the SNR and the distance are
    drawn, keyed by (seed, epoch, index). Validation always mixes as in epoch 0 and takes speech
    from the start of the file (from elsewhere only if the start is silent). Nothing is resampled.

    Args:
        root: a folder with `speech/` and `noise/`.
        chunk_size: samples of a clip (audio.chunk_size).
        sample_rate: Hz (audio.sample_rate).
        training: as in `ClipDataset`.
        seed: of everything drawn (training.seed).
        leading_zeros: zero samples put before each mixture in training.
        snr: lowest and highest SNR, dB (data.snr_min, data.snr_max); of the whole chunk, before
            leading zeros push its end out.
        distance: nearest and farthest talker, m.
        speed: largest change of the speech's speed, and with it of its pitch (data.speed).
        tilt: largest tilt of the speech's spectrum, up or down, dB per octave (data.tilt).
        room_probability: share of clips whose speech is convolved with an impulse response drawn
            from the files below `rooms/`, direct sound at sample 0 (data.room_probability).

    Raises:
        DataError: as in `ClipDataset`; or snr is no range; or rooms are asked for and not there.
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
        snr: tuple[float, float] = (-30.0, 0.0),
        distance: tuple[float, float] = (5.0, 20.0),
        speed: float = 0.0,
        tilt: float = 0.0,
        room_probability: float = 0.0,
    ) -> None:
        if not snr[0] <= snr[1]:
            raise DataError(f"snr {snr[0]} is above {snr[1]} dB: lower data.snr_min")
        self.snr = snr
        self.distance = distance
        self.speed = speed
        self.tilt = tilt
        self.room_probability = room_probability
        self.noise_files: list[Path] = []
        self.room_files: list[Path] = []
        super().__init__(
            root,
            chunk_size,
            sample_rate=sample_rate,
            training=training,
            seed=seed,
            leading_zeros=leading_zeros,
        )

    def _find(self) -> Sequence[tuple[Path, ...]]:
        if not all((self.root / name).is_dir() for name in ("speech", "noise")):
            raise _nothing_found(self.root, 3)
        speech = list_audio(self.root / "speech")
        self.noise_files = list_audio(self.root / "noise")
        for name, files in (("speech", speech), ("noise", self.noise_files)):
            if not files:
                raise DataError(
                    f"{self.root / name} holds no .wav or .flac file: add some, or check the path"
                )
        if self.room_probability:
            rooms = self.root / "rooms"
            self.room_files = list_audio(rooms) if rooms.is_dir() else []
            if not self.room_files:
                raise DataError(
                    f"{rooms} holds no impulse response, and data.room_probability is "
                    f"{self.room_probability}: add some, or set it to 0"
                )
        return [(path,) for path in speech]

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        (speech_file,) = self.items[index]
        noise_file = self.noise_files[int(rng.integers(len(self.noise_files)))]
        snr_db, distance = float(rng.uniform(*self.snr)), float(rng.uniform(*self.distance))
        faster = 1 + float(rng.uniform(-self.speed, self.speed)) if self.speed else 1.0
        speech, zeros = self._speech(speech_file, round(faster * self.chunk_size), rng)
        speech = change_speed(speech, self.chunk_size)
        speech = self._augment(speech, rng)
        noise = self._noise(noise_file, rng)
        if len(speech) != len(noise):
            raise DataError(
                f"{speech_file} has {len(speech)} channels but {noise_file} has {len(noise)}: "
                "bring both to one number of channels"
            )
        mixture = mix_pair(speech, noise, snr_db, distance)
        # Zeros come last, so that the SNR is that of the whole chunk however short the rest is.
        mix, target = (
            torch.nn.functional.pad(wave, (zeros, 0))[:, : self.chunk_size]
            for wave in (mixture.mix, mixture.target)
        )
        return mix, target

    def _augment(self, speech: Tensor, rng: np.random.Generator) -> Tensor:
        """Put the talker into a room and behind another microphone, as far as asked for."""
        if self.room_files and rng.random() < self.room_probability:
            path = self.room_files[int(rng.integers(len(self.room_files)))]
            check_rate(read_info(path), self.sample_rate)
            speech = reverberate(speech, read_audio(path)[0][0])
        if self.tilt:
            speech = tilt_spectrum(speech, self.sample_rate, rng.uniform(-self.tilt, self.tilt))
        return speech

    def _speech(self, path: Path, length: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Return an excerpt that is not silent, [C, length], and the zeros to put before it."""
        info = read_info(path)
        check_rate(info, self.sample_rate)
        for attempt in range(_TRIES):
            from_start = attempt == 0 and not self.training
            crop = draw_crop(info.frames, length, self.leading_zeros, None if from_start else rng)
            frames = min(info.frames - crop.start, length)
            wave = apply_crop(path, Crop(0, crop.start, frames), length)
            if not is_silent(wave):
                return wave, crop.zeros
        raise DataError(f"{path} is silent in {_TRIES} drawn excerpts: remove it from speech/")

    def _noise(self, path: Path, rng: np.random.Generator) -> Tensor:
        """Return an excerpt that is not silent, [C, T]."""
        info = read_info(path)
        check_rate(info, self.sample_rate)
        if info.frames < self.chunk_size:
            raise DataError(
                f"noise file {path} has {info.frames} samples, fewer than audio.chunk_size "
                f"{self.chunk_size}: remove it or lower audio.chunk_size"
            )
        for _ in range(_TRIES):
            wave = apply_crop(
                path, draw_crop(info.frames, self.chunk_size, 0, rng), self.chunk_size
            )
            if not is_silent(wave):
                return wave
        raise DataError(f"{path} is silent in {_TRIES} drawn excerpts: remove it from noise/")


def _stem(folder: Path, stem: str) -> Path:
    """Return the path of one stem of a sample."""
    found = [path for x in EXTENSIONS if (path := folder / f"{stem}{x}").is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder} has both {' and '.join(path.name for path in found)}: remove one of them"
        )
    if found:
        return found[0]
    raise DataError(
        f"{folder} has no {stem}.wav (or .flac): add it, or remove the folder {folder.name}"
    )


def _nothing_found(root: Path, dataset_type: int) -> DataError:
    """Explain why a folder does not fit its dataset_type, and what would."""
    here = f"{root} has no {LAYOUTS[dataset_type]}"
    other = find_layout(root)
    if other not in (None, dataset_type):
        return DataError(f"{here}, but {LAYOUTS[other]}: use --dataset_type {other}")
    splits = [name for name in ("train", "valid", "test") if find_layout(root / name)]
    if splits:
        return DataError(f"{here}: its splits are one level down, so use {root / splits[0]}")
    return DataError(f"{here}: check the path, or make the data with `diffbuf data build`")


def find_layout(root: Path) -> int | None:
    """Return the dataset_type that fits a folder, 1 to 3; None if none does."""
    if any(root.glob("sample_*/")):
        return 1
    for dataset_type, names in ((2, ("clean", "noisy")), (3, ("speech", "noise"))):
        if all((root / name).is_dir() for name in names):
            return dataset_type
    return None
