"""Make a DN-LM dataset from a speech folder and a noise folder.

Everything about sample `index` of a split follows from (seed, split, index), never from which
process makes it or what was made before.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map

from diffbuf_lib.data.audio import (
    list_audio,
    read_audio,
    read_info,
    resample,
    write_audio,
    write_bytes,
)
from diffbuf_lib.data.mixing import is_silent, mix_pair
from diffbuf_lib.errors import DataError

STEMS = ("mixture", "vocals", "noise")
_LIBRISPEECH = (
    *("dev-clean", "dev-other", "test-clean", "test-other"),
    *("train-clean-100", "train-clean-360", "train-other-500"),
)
_SPLIT_NUMBERS = {"train": 0, "valid": 1, "test": 2}  # keys of randomness: never renumber
_SAMPLES_WORTH_A_PROCESS = 200  # with fewer, starting it takes longer than it saves
_TRIES = 20  # excerpts drawn from one file before the loudest is taken
_LOUD_ENOUGH = 0.3  # of the file's RMS (about -10 dB): an excerpt below it is mostly a pause
_RESAMPLING_MARGIN = 0.05  # s read on both sides of an excerpt, where the filter rings
_Item = TypeVar("_Item")


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the first must not be above the second")
    return pair


_Decibels = Annotated[float, Field(ge=-100, le=100)]
_Metres = Annotated[float, Field(ge=0.01, le=10000)]


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """The options of `build_dnlm`, with their limits."""

    train: int = Field(6480, ge=1)  # training samples
    valid: int = Field(720, ge=0)  # validation samples
    seconds: float = Field(1.0, ge=0.01, le=3600)  # of their clips; shorter speech is padded
    sample_rate: int = Field(16000, ge=1000)  # Hz, of the files that are written
    # Lowest and highest input SNR, dB; nearest and farthest talker, m.
    snr: Annotated[tuple[_Decibels, _Decibels], AfterValidator(_rising)] = (-30.0, 0.0)
    distance: Annotated[tuple[_Metres, _Metres], AfterValidator(_rising)] = (5.0, 20.0)
    seed: int = Field(0, ge=0)  # of everything drawn
    test: int = Field(0, ge=0)  # test samples
    test_seconds: float = Field(6.0, ge=0.01, le=3600)  # of the test clips
    # Names of the speakers (or files) of valid and test; None draws them.
    valid_speakers: Annotated[list[str], AfterValidator(sorted)] | None = None


def build_dnlm(
    speech_dir: str | Path,  # .wav or .flac at any depth, such as LibriSpeech/train-clean-100
    noise_dir: str | Path,  # .wav or .flac at any depth
    out_dir: str | Path,  # where to make the dataset; not inside the other two
    *,
    processes: int | None = None,  # None takes one a core, or none if there is little to do
    progress: bool = False,  # show a progress bar on stderr
    **options: Any,  # the fields of `Recipe`
) -> Path:
    """Make `{train,valid,test}/sample_00000/{mixture,vocals,noise}.wav` and `metadata.json`.

    Any number of processes writes the same bytes. An interrupted build continues where it stopped
    when called again with the same arguments.

    Speech of train and valid is disjoint: by speaker, which is the first folder level below
    `speech_dir` at which there are two folders (that of LibriSpeech), or by file where there are
    fewer than two speakers. Noise is disjoint by file, or by time if there is only one file. The
    test split shares speakers and noise with valid, never with train. Every speech file is used
    once before any is used twice. Files of several channels are averaged to one, and files of
    another rate are resampled.

    Raises:
        DataError: an option out of its limits; too few files to split; a source file that cannot
            be used; a full disk; or an `out_dir` that was built with other options.
    """
    speech_dir, noise_dir, out_dir = Path(speech_dir), Path(noise_dir), Path(out_dir)
    try:
        recipe = Recipe(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        raise DataError(
            f"{name} {options[str(name)]} is refused ({first['msg']}): change --{name}"
        ) from error
    if processes is not None and processes < 1:
        raise DataError(f"processes {processes} is below 1: raise --processes")
    _check_apart(speech_dir=speech_dir, noise_dir=noise_dir, out_dir=out_dir)
    samples = _plan(speech_dir, noise_dir, out_dir, recipe)
    here = any((out_dir / name).exists() for name in _SPLIT_NUMBERS)
    if here and not (out_dir / "build.json").exists():
        raise DataError(
            f"{out_dir} holds a dataset without build.json, made elsewhere: choose another folder"
        )
    sources = _fingerprint(speech_dir, noise_dir)
    claim(out_dir / "build.json", {**recipe.model_dump(mode="json"), "sources": sources})
    make_samples(samples, processes=processes, progress=progress)
    return out_dir


class NoiseRegion(NamedTuple):
    """The part of a noise file that one split may use."""

    name: str  # path below the noise folder
    start: int  # first sample, at the file's own rate
    stop: int  # one past the last


@dataclass(frozen=True)
class Split:
    """What the samples of one split have in common."""

    name: str  # train, valid or test
    number: int  # its key of randomness
    count: int  # of samples
    frames: int  # of each clip, at sample_rate
    sample_rate: int  # Hz
    snr: tuple[float, ...]  # lowest and highest input SNR, dB; if more than two, taken in turn
    distance: tuple[float, float]  # nearest and farthest talker, m
    seed: int
    folder: Path  # where the sample folders go
    speech_dir: Path
    noise_dir: Path


class Sample(NamedTuple):
    """One sample as it is drawn before any audio is read; small, since processes are sent it."""

    split: Split
    number: int  # from 0
    record: dict[str, Any]  # its entry in metadata.json
    noise: NoiseRegion

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.split.folder / str(self.record["id"])


def draw_samples(
    split: Split, speech: Sequence[str], noise: Sequence[NoiseRegion]
) -> Iterator[Sample]:
    """Draw SNR, distance and noise of each sample of a split; speech files are used in turn."""
    for index in range(split.count):
        rng = np.random.default_rng([split.seed, split.number, index])
        drawn = float(rng.uniform(split.snr[0], split.snr[-1]))
        distance = float(rng.uniform(*split.distance))
        region = noise[int(rng.integers(len(noise)))]
        record = {
            "id": f"sample_{index:05d}",
            "input_snr": split.snr[index % len(split.snr)] if len(split.snr) > 2 else drawn,
            "speech_source": speech[index % len(speech)],
            "noise_source": region.name,
            "speech_distance": distance,
        }
        yield Sample(split, index, record, region)


def make_samples(
    samples: Iterable[Sample], *, processes: int | None = None, progress: bool = False
) -> None:
    """Make the samples that are missing, and last metadata.json, which says that a split is whole.

    Raises:
        DataError: a source file cannot be used, the disk is full, or a worker was killed.
    """
    of_split: dict[Split, list[Sample]] = {}
    for sample in samples:
        of_split.setdefault(sample.split, []).append(sample)
    for split in of_split:
        for leftover in split.folder.glob(".sample_*.tmp"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
    todo = [
        sample
        for sample in chain(*of_split.values())
        if not all((sample.folder / f"{stem}.wav").is_file() for stem in STEMS)
    ]
    if processes is None:
        processes = min(_cores(), len(todo) // _SAMPLES_WORTH_A_PROCESS)
    run_parallel(make_sample, todo, processes, desc="clips", disable=not progress)
    for split, made in of_split.items():
        content = {split.name: [sample.record for sample in made]}
        _write_json(split.folder / "metadata.json", content)


def make_sample(sample: Sample) -> None:
    """Make the folder of a sample, whole or not at all.

    The files are rounded to 16 bits so that mixture = vocals + noise holds bit for bit.

    Raises:
        DataError: a source file cannot be used, or the disk is full.
    """
    split, record = sample.split, sample.record
    # Another key than draw_samples', so that excerpts are not made of the same random numbers.
    rng = np.random.default_rng([split.seed, split.number, sample.number, 1])
    speech_file = split.speech_dir / record["speech_source"]
    noise_file = split.noise_dir / record["noise_source"]
    with _one_thread():
        speech = _speech_excerpt(split, speech_file, rng)
        noise = _noise_excerpt(split, noise_file, sample.noise, rng)
        try:
            mixture = mix_pair(speech, noise, record["input_snr"], record["speech_distance"])
        except DataError as error:
            raise DataError(f"{speech_file} with {noise_file}: {error}") from error
    target, noise = (torch.round(wave * 32768) / 32768 for wave in (mixture.target, mixture.noise))
    # Written to a temporary folder, then renamed: a folder called sample_* is a finished one.
    temporary = sample.folder.with_name(f".{sample.folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for stem, wave in zip(STEMS, (target + noise, target, noise), strict=True):
            write_audio(temporary / f"{stem}.wav", wave, split.sample_rate)
        if sample.folder.exists():  # an incomplete one: someone deleted a file in it
            shutil.rmtree(sample.folder)
        temporary.rename(sample.folder)
    except OSError as error:
        raise DataError(
            f"{sample.folder} cannot be written ({error.strerror}): free disk space or choose "
            "another folder, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim(marker: Path, parameters: dict[str, Any]) -> None:
    """Save a build's parameters as `marker`, or check that they are those it holds already.

    Raises:
        DataError: the folder was built with other parameters, or cannot be written.
    """
    folder, fix = marker.parent, "choose another folder, or delete this one"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror}): {fix}") from error
    if not marker.exists():
        return _write_json(marker, parameters)
    try:
        before = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise DataError(f"{marker} cannot be read: {fix}")
    for key, value in parameters.items():
        if before.get(key) != value:
            what = f"{key} {before.get(key)}, not {value}"
            if key == "sources":
                what = "other speech or noise files"
            raise DataError(f"{folder} was built with {what}: {fix}")


def run_parallel(
    function: Callable[[_Item], None], items: Sequence[_Item], processes: int, **bar: Any
) -> None:
    """Call `function(item)` for every item; from two processes on, in worker processes.

    `bar` has the options of tqdm's progress bar.

    Raises:
        DataError: a worker was killed.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        for item in tqdm(items, **bar):
            function(item)
        return
    tasks = [(function, item) for item in items]
    try:
        process_map(_work, tasks, max_workers=processes, chunksize=1, **bar)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended early, perhaps for lack of memory: run again with processes=1; "
            "what is finished is kept"
        ) from error


def download_librispeech(out_dir: str | Path, subset: str = "train-clean-100") -> Path:
    """Download a subset of LibriSpeech (Panayotov et al., ICASSP 2015; CC BY 4.0) by torchaudio.

    The archive is checked against its hash and unpacked beside its final place, so a folder called
    as the subset is a whole one, and is kept. An interrupted download starts again.

    Args:
        out_dir: where to put it.
        subset: such as "dev-clean" (0.3 GB) or "train-clean-100" (6 GB).

    Returns:
        `out_dir/LibriSpeech/<subset>`: a folder a speaker, .flac at 16 kHz; for `build_dnlm`.

    Raises:
        DataError: an unknown subset, no network, or a full disk.
    """
    if subset not in _LIBRISPEECH:
        known = ", ".join(_LIBRISPEECH)
        raise DataError(f"LibriSpeech has no subset {subset!r}: take one of {known}")
    final = Path(out_dir) / "LibriSpeech" / subset
    if final.is_dir():
        return final
    work = Path(out_dir) / f".librispeech-{subset}"
    try:
        # A tree that was unpacked in part would pass for a whole one; the archive may stay.
        shutil.rmtree(work / "LibriSpeech", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        from torchaudio.datasets import LIBRISPEECH

        LIBRISPEECH(work, url=subset, download=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / "LibriSpeech" / subset, final)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())
        raise DataError(
            f"LibriSpeech {subset} cannot be downloaded to {out_dir} ({reason}): check the network "
            f"and the disk, or unpack the archive from https://www.openslr.org/12 as {final}; "
            "without a network, `diffbuf data demo` makes a small dataset"
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    return final


def _check_apart(**folders: Path) -> None:
    """Refuse folders inside each other: noise would count as speech, results as sources."""
    for inner, folder in folders.items():
        for outer, around in folders.items():
            nested = folder.resolve().is_relative_to(around.resolve())
            if nested and inner != outer != "out_dir":
                raise DataError(
                    f"{inner} {folder} lies inside {outer} {around}: use separate folders"
                )


def _plan(speech_dir: Path, noise_dir: Path, out_dir: Path, recipe: Recipe) -> list[Sample]:
    """Decide which sources each split draws from, and draw."""
    counts = {"train": recipe.train, "valid": recipe.valid, "test": recipe.test}
    seconds = {"train": recipe.seconds, "valid": recipe.seconds, "test": recipe.test_seconds}
    frames = {name: round(seconds[name] * recipe.sample_rate) for name in counts}
    held_out = recipe.valid + recipe.test
    fraction = held_out / (recipe.train + held_out)
    longest = max((frames[name] for name in ("valid", "test") if counts[name]), default=0)
    speech = _split_speech(speech_dir, fraction, recipe)
    noise = _split_noise(noise_dir, fraction, recipe, (frames["train"], longest))
    return [
        sample
        for name, number in _SPLIT_NUMBERS.items()
        for sample in draw_samples(
            Split(
                name=name,
                number=number,
                count=counts[name],
                frames=frames[name],
                sample_rate=recipe.sample_rate,
                snr=recipe.snr,
                distance=recipe.distance,
                seed=recipe.seed,
                folder=out_dir / name,
                speech_dir=speech_dir,
                noise_dir=noise_dir,
            ),
            speech[min(number, 1)],
            noise[min(number, 1)],
        )
    ]


def _split_speech(folder: Path, fraction: float, recipe: Recipe) -> list[tuple[str, ...]]:
    """Divide speech files, each in a shuffled order, into those to train with and the held-out."""
    names = [path.relative_to(folder).as_posix() for path in list_audio(folder)]
    if not names:
        raise DataError(f"speech folder {folder} holds no .wav or .flac file: check the path")
    speaker_of = _speakers(names)
    speakers = sorted(set(speaker_of.values()))
    held: Collection[str] | None = recipe.valid_speakers
    if held is None:
        held = _hold_out(speakers, fraction, recipe.seed, f"speech files in {folder}")
    elif unknown := sorted(set(held) - set(speakers)):
        raise DataError(
            f"valid_speakers {unknown[0]!r} is none of the {len(speakers)} speakers in "
            f"{folder}, such as {speakers[0]!r}: name a folder (or file) that is there"
        )
    elif fraction > 0 and not 0 < len(set(held)) < len(speakers):
        raise DataError(
            f"valid_speakers names {len(held)} of the {len(speakers)} speakers in {folder}: "
            "leave at least one to train and one to valid"
        )
    order = np.random.default_rng([recipe.seed, 10]).permutation(len(names))
    shuffled = [names[i] for i in order]
    return [
        tuple(name for name in shuffled if (speaker_of[name] in held) == wanted)
        for wanted in (False, True)
    ]


def _speakers(names: Sequence[str]) -> dict[str, str]:
    """Map each file to its speaker: the first folder level with two folders, else the file."""
    parts = {name: PurePosixPath(name).parts for name in names}
    for level in range(min(map(len, parts.values()))):
        folders = {part[level] for part in parts.values() if len(part) > level + 1}
        if len(folders) >= 2:
            return {
                name: part[level] if len(part) > level + 1 else name for name, part in parts.items()
            }
    return {name: name for name in names}


def _split_noise(
    folder: Path, fraction: float, recipe: Recipe, frames: tuple[int, int]
) -> list[tuple[NoiseRegion, ...]]:
    """Divide noise, by file or one file by time; `frames` is what clips of both parts need."""
    infos = [read_info(path) for path in list_audio(folder)]
    if not infos:
        raise DataError(f"noise folder {folder} holds no .wav or .flac file: check the path")
    if len(infos) == 1 and fraction > 0:
        (only,) = infos
        # Time to valid in proportion, but at least one clip's worth to it.
        least = _noise_frames(frames[1], recipe.sample_rate, only.sample_rate)
        cut = max(0, min(round(only.frames * (1 - fraction)), only.frames - least))
        parts = [[(only, 0, cut)], [(only, cut, only.frames)]]
    else:
        held = set(_hold_out(infos, fraction, recipe.seed, f"noise files in {folder}"))
        parts = [
            [(info, 0, info.frames) for info in infos if (info in held) == wanted]
            for wanted in (False, True)
        ]
    for part, count in zip(parts, frames, strict=True):
        for info, start, stop in part:
            needed = _noise_frames(count, recipe.sample_rate, info.sample_rate)
            if stop - start < needed:
                raise DataError(
                    f"noise file {info.path} offers {(stop - start) / info.sample_rate:.2f} s, "
                    f"fewer than the {needed / info.sample_rate:.2f} s that a clip takes: remove "
                    "it, add longer noise, or lower --seconds (--test_seconds)"
                )
    return [
        tuple(NoiseRegion(i.path.relative_to(folder).as_posix(), *ends) for i, *ends in part)
        for part in parts
    ]


def _hold_out(items: Sequence[_Item], fraction: float, seed: int, what: str) -> list[_Item]:
    """Draw a fraction of the items, at least one, leaving at least one."""
    if fraction == 0:
        return []
    if len(items) < 2:
        raise DataError(
            f"there are too few {what} ({len(items)}) to keep train and valid apart: add files, "
            "or set --valid 0"
        )
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    order = np.random.default_rng([seed, 11]).permutation(len(items))
    return [items[i] for i in sorted(order[:count])]


def _fingerprint(*folders: Path) -> str:
    """Return a hash of the names and sizes of all source files, wherever the folders lie."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in list_audio(folder):
            entry = f"{path.relative_to(folder).as_posix()}\t{path.stat().st_size}\n"
            digest.update(entry.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _speech_excerpt(split: Split, path: Path, rng: np.random.Generator) -> Tensor:
    """Return [1, T] speech with energy in it: never a pause if the file has more than pauses."""
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


def _noise_excerpt(
    split: Split, path: Path, region: NoiseRegion, rng: np.random.Generator
) -> Tensor:
    """Return [1, T] noise from the split's part of the file; only what is needed is read."""
    rate = read_info(path).sample_rate
    needed = _noise_frames(split.frames, split.sample_rate, rate)
    for _ in range(_TRIES):
        start = int(rng.integers(region.start, region.stop - needed + 1))
        wave, _ = read_audio(path, start, needed)
        if not is_silent(wave):
            break
    wave = resample(wave.mean(0, keepdim=True), rate, split.sample_rate)
    skip = int(_RESAMPLING_MARGIN * split.sample_rate) if rate != split.sample_rate else 0
    return wave[:, skip : skip + split.frames]


def _noise_frames(frames: int, sample_rate: int, file_rate: int) -> int:
    """Return how many samples of a file make an excerpt: with a margin if it is resampled."""
    if file_rate == sample_rate:
        return frames
    return int(np.ceil((frames / sample_rate + 2 * _RESAMPLING_MARGIN) * file_rate))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sum in one order however many cores there are: the last bit of a sum depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _work(task: tuple[Callable[[Any], None], Any]) -> None:
    _prepare_worker()
    function, item = task
    function(item)


@cache
def _prepare_worker() -> None:
    """In a worker: leave Ctrl-C to the parent, use one thread, end if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _cores() -> int:
    """Return the cores that this process may use, where the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
