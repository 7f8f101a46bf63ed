"""One DN-LM sample: what is drawn for it, and its three files.

Everything about sample `index` of a split follows from (seed, split, index), never from which
process makes it or what was made before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data.files import read_audio, read_info, resample, write_audio, write_bytes
from diffbuf_lib.data.mixing import Mixture, is_silent, mix_pair
from diffbuf_lib.errors import DataError

STEMS = ("mixture", "vocals", "noise")
_TRIES = 20  # excerpts drawn from one file before the loudest is taken
_LOUD_ENOUGH = 0.3  # of the file's RMS (about -10 dB): an excerpt below it is mostly a pause
_RESAMPLING_MARGIN = 0.05  # s read on both sides of an excerpt, where the filter rings


@dataclass(frozen=True)
class NoiseRegion:
    """The part of a noise file that one split may use.

    Attributes:
        name: path below the noise folder.
        start: first sample, in the file's own rate.
        stop: one past the last sample.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Split:
    """All that is needed to make any sample of one split; travels to worker processes.

    Attributes:
        name: "train", "valid" or "test".
        number: the split's key for randomness.
        count: number of samples.
        frames: samples of each clip, at `sample_rate`.
        sample_rate: Hz.
        snr: lowest and highest input SNR, dB.
        distance: nearest and farthest talker, m.
        seed: of everything drawn.
        folder: where the sample folders go.
        speech_dir: what `speech` is relative to.
        noise_dir: what the noise names are relative to.
        speech: speech files in the order of their use; used again from the first when they run out.
        noise: the parts of noise files that this split may use.
        snr_grid: SNRs in dB that samples take in turn, instead of one drawn from `snr`.
    """

    name: str
    number: int
    count: int
    frames: int
    sample_rate: int
    snr: tuple[float, float]
    distance: tuple[float, float]
    seed: int
    folder: Path
    speech_dir: Path
    noise_dir: Path
    speech: tuple[str, ...]
    noise: tuple[NoiseRegion, ...]
    snr_grid: tuple[float, ...] = ()


@dataclass(frozen=True)
class Draw:
    """What is drawn for one sample before any audio is read.

    Attributes:
        id: name of the sample's folder.
        snr_db: input SNR, dB.
        speech: path below the speech folder.
        noise: where the noise comes from.
        distance: from the talker to the microphone, m.
    """

    id: str
    snr_db: float
    speech: str
    noise: NoiseRegion
    distance: float

    def record(self) -> dict[str, Any]:
        """Return the sample's entry in metadata.json."""
        return {
            "id": self.id,
            "input_snr": self.snr_db,
            "speech_source": self.speech,
            "noise_source": self.noise.name,
            "speech_distance": self.distance,
        }


def draw(split: Split, index: int) -> Draw:
    """Draw SNR, distance and sources of sample `index` of a split: no file is read."""
    rng = np.random.default_rng([split.seed, split.number, index])
    snr_db = float(rng.uniform(*split.snr))
    if split.snr_grid:
        snr_db = split.snr_grid[index % len(split.snr_grid)]
    return Draw(
        id=f"sample_{index:05d}",
        snr_db=snr_db,
        distance=float(rng.uniform(*split.distance)),
        noise=split.noise[int(rng.integers(len(split.noise)))],
        speech=split.speech[index % len(split.speech)],
    )


def is_complete(split: Split, index: int) -> bool:
    """Return whether the folder of sample `index` holds all of its files."""
    folder = split.folder / f"sample_{index:05d}"
    return all((folder / f"{stem}.wav").is_file() for stem in STEMS)


def make_sample(split: Split, index: int) -> None:
    """Make the folder of sample `index`, whole or not at all.

    The files are rounded to 16 bits so that mixture = vocals + noise holds bit for bit.

    Raises:
        DataError: a source file cannot be used, or the disk is full; the message names the file.
    """
    drawn = draw(split, index)
    # Another key than draw()'s, so that the excerpts are not made of the same random numbers.
    rng = np.random.default_rng([split.seed, split.number, index, 1])
    with _one_thread():
        speech = _speech_excerpt(split, drawn, rng)
        noise = _noise_excerpt(split, drawn, rng)
        try:
            mixture = mix_pair(speech, noise, drawn.snr_db, drawn.distance)
        except DataError as error:
            sources = f"{split.speech_dir / drawn.speech} and {split.noise_dir / drawn.noise.name}"
            raise DataError(f"{drawn.id} from {sources}: {error}") from error
    _write_sample(split, drawn.id, mixture)


def write_metadata(split: Split) -> None:
    """Write metadata.json, what was drawn for every sample of a split; the last of its files."""
    records = [draw(split, index).record() for index in range(split.count)]
    content = json.dumps({split.name: records}, indent=1, ensure_ascii=False) + "\n"
    write_bytes(split.folder / "metadata.json", content.encode())


def _write_sample(split: Split, name: str, mixture: Mixture) -> None:
    """Write to a temporary folder, then rename: a folder called sample_* is a finished one."""
    target, noise = (torch.round(wave * 32768) / 32768 for wave in (mixture.target, mixture.noise))
    waves = dict(zip(STEMS, (target + noise, target, noise), strict=True))
    temporary = split.folder / f".{name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for stem, wave in waves.items():
            write_audio(temporary / f"{stem}.wav", wave, split.sample_rate)
        final = split.folder / name
        if final.exists():  # an incomplete one: someone deleted a file in it
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError as error:
        raise DataError(
            f"{split.folder / name} cannot be written ({error.strerror}): free disk space or "
            "choose another folder, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _speech_excerpt(split: Split, drawn: Draw, rng: np.random.Generator) -> Tensor:
    """Return [1, T] speech with energy in it: never a pause if the file has more than pauses."""
    path = split.speech_dir / drawn.speech
    wave, rate = read_audio(path)
    wave = resample(wave.mean(0, keepdim=True), rate, split.sample_rate)  # [1, whole file]
    if is_silent(wave):
        raise DataError(f"{path} is silent: remove it from the speech folder")
    spare = wave.shape[1] - split.frames
    if spare <= 0:
        return torch.nn.functional.pad(wave, (0, -spare))
    # Energy of every possible excerpt at once, from differences of the running sum.
    running = torch.nn.functional.pad(wave[0].double().square().cumsum(0), (1, 0))
    energy = (running[split.frames :] - running[: -split.frames]) / split.frames
    enough = _LOUD_ENOUGH**2 * float(running[-1]) / wave.shape[1]
    starts = rng.integers(spare + 1, size=_TRIES)
    loud = [int(start) for start in starts if float(energy[start]) >= enough]
    start = loud[0] if loud else int(energy.argmax())
    return wave[:, start : start + split.frames]


def _noise_excerpt(split: Split, drawn: Draw, rng: np.random.Generator) -> Tensor:
    """Return [1, T] noise from the split's part of the file; only what is needed is read."""
    path = split.noise_dir / drawn.noise.name
    rate = read_info(path).sample_rate
    needed = noise_frames(split.frames, split.sample_rate, rate)
    first, last = drawn.noise.start, drawn.noise.stop - needed
    for _ in range(_TRIES):
        start = int(rng.integers(first, last + 1))
        wave, _ = read_audio(path, start, needed)
        if not is_silent(wave):
            break
    wave = resample(wave.mean(0, keepdim=True), rate, split.sample_rate)
    skip = int(_RESAMPLING_MARGIN * split.sample_rate) if rate != split.sample_rate else 0
    return wave[:, skip : skip + split.frames]


def noise_frames(frames: int, sample_rate: int, file_rate: int) -> int:
    """Return how many samples of a file make an excerpt.

    Args:
        frames: of the excerpt, samples at `sample_rate`.
        sample_rate: Hz, of the excerpt.
        file_rate: Hz, of the file.

    Returns:
        Samples at `file_rate`: with a margin for the resampling filter if the rates differ.
    """
    if file_rate == sample_rate:
        return frames
    return int(np.ceil((frames / sample_rate + 2 * _RESAMPLING_MARGIN) * file_rate))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sum in one order however many cores there are: the last bit of a sum depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
