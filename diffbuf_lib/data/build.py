"""Make a DN-LM dataset from a speech folder and a noise folder.

Sample `index` of a split depends on (seed, split, index) alone, not on which process makes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, permutations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffbuf_lib.data import audio
from diffbuf_lib.data.mixing import is_silent, mix_pair
from diffbuf_lib.errors import ConfigError, DataError, DiffbufError
from diffbuf_lib.options import Recipe
from diffbuf_lib.trace import to_plain

STEMS = ("mixture", "vocals", "noise")
_LIBRISPEECH = (
    *("dev-clean", "dev-other", "test-clean", "test-other"),
    *("train-clean-100", "train-clean-360", "train-other-500"),
)
_SAMPLES_WORTH_A_PROCESS = 200  # with fewer, starting it takes longer than it saves
_TRIES = 20  # excerpts drawn from one file before the loudest is taken
_LOUD_ENOUGH = 0.3  # of the file's RMS (about -10 dB): an excerpt below it is mostly a pause
_RESAMPLING_MARGIN = 0.05  # s read on both sides of an excerpt, where the filter rings
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# The part of a noise file that a split may use: path below noise_dir, first sample, end.
_Region = tuple[str, int, int]


def build_dnlm(
    speech_dir: str | Path,  # .wav or .flac at any depth, such as LibriSpeech/train-clean-100
    noise_dir: str | Path,  # .wav or .flac at any depth
    out_dir: str | Path,  # where to make the dataset; not inside the other two
    *,
    part: str = "1/1",  # of a job array: "2/8" makes the second of eight shares
    processes: int | None = None,  # None: one per core, or none if there is little to do
    progress: bool = False,  # show a progress bar on stderr
    **options: Any,  # the fields of `Recipe`
) -> Path:
    """Make `{train,valid,test}/sample_00000/{mixture,vocals,noise}.wav` and `metadata.json`.

    Any number of processes and parts writes the same bytes, and an interrupted build goes on when
    called again with the same arguments. Other rates are resampled, and channels averaged to one.

    Speech of train and valid is disjoint: by speaker (the first level below `speech_dir` at which
    there are two folders), or by file. Noise is disjoint by file, or by time if there is only one.
    Test shares speakers and noise with valid. All speech files are used before any is used twice.

    DataError for an option out of its limits; too few or unusable source files; a full disk; or an
    `out_dir` that was built with other options.
    """
    samples = prepare(speech_dir, noise_dir, out_dir, **options)
    make_samples(samples, part=part, processes=processes, progress=progress)
    return Path(out_dir)


def prepare(
    speech_dir: str | Path, noise_dir: str | Path, out_dir: str | Path, **options: Any
) -> list[Sample]:
    """Claim the output folder and draw all samples; raises the errors of `build_dnlm`."""
    speech_dir, noise_dir, out_dir = Path(speech_dir), Path(noise_dir), Path(out_dir)
    try:
        recipe = TypeAdapter(Recipe).validate_python(options)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        raise DataError(f"{name} {options[name]}: {problem['msg']}: change --{name}") from error
    # With nested folders, noise would count as speech, or results as sources.
    folders = {"speech_dir": speech_dir, "noise_dir": noise_dir, "out_dir": out_dir}
    for (inner, folder), (outer, around) in permutations(folders.items(), 2):
        if outer != "out_dir" and folder.resolve().is_relative_to(around.resolve()):
            raise DataError(f"{inner} {folder} lies inside {outer} {around}: use separate folders")
    samples = _plan(speech_dir, noise_dir, out_dir, recipe)
    marker = out_dir / "build.json"
    if not marker.exists() and any((out_dir / name).exists() for name in ("train", "valid")):
        raise DataError(f"{out_dir} holds a dataset without build.json: choose another folder")
    sources = hashlib.sha256()  # names and sizes of all files, wherever the folders are
    for folder in (speech_dir, noise_dir):
        for path in audio.list_audio(folder):
            name = path.relative_to(folder).as_posix()
            sources.update(f"{name}\t{path.stat().st_size}\n".encode())
        sources.update(b"\0")
    claim(marker, {**to_plain(recipe), "sources": sources.hexdigest()})
    return samples


@dataclass(frozen=True)
class Split:
    """What the samples of one split have in common."""

    name: str
    number: int  # part of the random seed: never renumber
    count: int  # of samples
    frames: int  # of each clip, at sample_rate
    folder: Path  # where the sample folders go
    speech_dir: Path
    noise_dir: Path
    sample_rate: int  # Hz
    snr: tuple[float, ...]  # lowest and highest input SNR, dB; if more than two, taken in turn
    distance: tuple[float, float]  # nearest and farthest talker, m
    seed: int


class Sample(NamedTuple):
    """One sample as drawn, before any audio is read; small, because it is sent to processes."""

    split: Split
    number: int  # from 0
    folder: Path
    record: dict[str, Any]  # its entry in metadata.json
    noise: _Region


def draw_samples(split: Split, speech: Sequence[str], noise: Sequence[_Region]) -> Iterator[Sample]:
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
            "noise_source": region[0],
            "speech_distance": distance,
        }
        yield Sample(split, index, split.folder / f"sample_{index:05d}", record, region)


def make_samples(
    samples: Iterable[Sample],
    *,
    part: str = "1/1",
    processes: int | None = None,
    progress: bool = False,
) -> None:
    """Make a part's missing samples, then metadata.json of every split that is now complete."""
    samples = list(samples)
    todo = [s for s in take_part(samples, part) if not _is_made(s)]
    if processes is None:
        processes = min(cores(), len(todo) // _SAMPLES_WORTH_A_PROCESS)
    run_parallel(make_sample, todo, processes, desc="clips", disable=not progress)
    for split, found in groupby(samples, key=lambda sample: sample.split):
        made = list(found)
        if part == "1/1" or all(map(_is_made, made)):
            write_records(split.folder, made)


def write_records(folder: Path, samples: Sequence[Sample]) -> None:
    """Write metadata.json of a split."""
    records = {samples[0].split.name: [sample.record for sample in samples]}
    audio.write_json(folder / "metadata.json", records)


def _is_made(sample: Sample) -> bool:
    return all((sample.folder / f"{stem}.wav").is_file() for stem in STEMS)


def take_part(items: Sequence[_Item], part: str) -> Sequence[_Item]:
    """Return part "i/n" of a job array: every n-th item from the i-th on; else ConfigError."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise ConfigError(f"--part {part!r:.40}: give it as 1/8 to 8/8")
    return items[i - 1 :: n]


def make_sample(sample: Sample) -> None:
    """Make a folder of three files, whole or not at all, with mixture = vocals + noise exactly."""
    split, record = sample.split, sample.record
    # Not the key of draw_samples, so that excerpts do not reuse its random numbers.
    rng = np.random.default_rng([split.seed, split.number, sample.number, 1])
    speech_file = split.speech_dir / record["speech_source"]
    speech, noise = _speech_excerpt(split, speech_file, rng), _noise_excerpt(sample, rng)
    try:
        mixture = mix_pair(speech, noise, record["input_snr"], record["speech_distance"])
    except DataError as error:
        raise DataError(f"{speech_file} with {record['noise_source']}: {error}") from error
    target, noise = (torch.round(wave * 32768) / 32768 for wave in (mixture.target, mixture.noise))
    # Written to a temporary folder, then renamed: a folder called sample_* is a finished one.
    temporary = sample.folder.with_name(f".{sample.folder.name}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for stem, wave in zip(STEMS, (target + noise, target, noise), strict=True):
            audio.write_audio(temporary / f"{stem}.wav", wave, split.sample_rate)
        shutil.rmtree(sample.folder, ignore_errors=True)  # someone deleted a file in it
        temporary.rename(sample.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim(marker: Path, parameters: dict[str, Any]) -> None:
    """Save a folder's parameters as `marker`; DataError if it was made with other ones."""
    folder, fix = marker.parent, "choose another folder, or delete this one"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            audio.write_json(marker, parameters)
        before = dict(json.loads(marker.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{marker} cannot be made or read ({error}): {fix}") from error
    for key, value in parameters.items():
        if before.get(key) != value:
            other = f"{key} {before.get(key)!s:.80}, not {value!s:.80}"
            what = "other speech or noise files" if key == "sources" else other
            raise DataError(f"{folder} was made with {what}: {fix}")


def cores() -> int:
    """Return how many of this machine's cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_parallel(
    function: Callable[[_Item], Any], items: Sequence[_Item], processes: int, **bar: Any
) -> None:
    """Call `function(item)` for every item as `parallel` does; `bar` has the options of tqdm."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like the workers: the last bit of a sum depends on it
    try:
        with naming_deaths():
            for _ in tqdm(parallel(function, items, processes), total=len(items), **bar):
                pass
    finally:
        torch.set_num_threads(threads)


def parallel(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    processes: int,
    context: str | None = None,  # how processes are started; None for the system's default
) -> Generator[_Result, None, None]:
    """Yield `function(item)` for every item in order; with two or more processes, from workers."""
    workers = min(processes, len(items)) if min(processes, len(items)) > 1 else 0  # 0: this one
    # A DataLoader's workers compute with one thread, and end when this process does.
    loader: DataLoader[Any] = DataLoader(
        items,  # type: ignore[arg-type]  # any sequence will do
        batch_size=None,
        num_workers=workers,
        collate_fn=partial(_attempt, function),
        multiprocessing_context=context if workers else None,
    )
    for result in loader:
        if isinstance(result, DiffbufError):
            raise result
        yield result


def _attempt(function: Callable[[_Item], _Result], item: _Item) -> _Result | DiffbufError:
    """Return an error instead of raising it: a DataLoader would wrap it in a traceback."""
    try:
        return function(item)
    except DiffbufError as error:
        return error


@contextmanager
def naming_deaths() -> Iterator[None]:
    """Turn torch's error for a killed worker, wherever it is raised, into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            f"a worker process was killed ({str(error).splitlines()[0]}), most likely for lack of "
            "memory: go on with the same command and fewer --processes; what is finished is kept"
        ) from error


def download_librispeech(out_dir: str | Path, subset: str = "train-clean-100") -> Path:
    """Download `out_dir/LibriSpeech/<subset>` (Panayotov et al., ICASSP 2015; CC BY 4.0).

    Subsets are dev-clean (0.3 GB), train-clean-100 (6 GB) and so on; an existing one is kept.
    DataError for an unknown subset, without a network, or for a full disk.
    """
    if subset not in _LIBRISPEECH:
        raise DataError(f"subset {subset!r} of LibriSpeech is not one of {', '.join(_LIBRISPEECH)}")
    final = Path(out_dir) / "LibriSpeech" / subset
    if final.is_dir():
        return final
    work = Path(out_dir) / f".librispeech-{subset}"  # renamed when whole
    try:
        # A partly unpacked tree would pass for a complete one; the archive may stay.
        shutil.rmtree(work / "LibriSpeech", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        from torchaudio.datasets import LIBRISPEECH

        LIBRISPEECH(work, url=subset, download=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / "LibriSpeech" / subset, final)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError
        raise DataError(
            f"LibriSpeech {subset} cannot be downloaded to {out_dir} ({audio.reason(error)}): "
            f"check the network, or unpack it from https://www.openslr.org/12 as {final}; "
            "`diffbuf data demo` needs no network"
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    return final


def _plan(speech_dir: Path, noise_dir: Path, out_dir: Path, recipe: Recipe) -> list[Sample]:
    """Decide which sources each split draws from, and draw."""
    counts = {"train": recipe.train, "valid": recipe.valid, "test": recipe.test}
    seconds = (recipe.seconds, recipe.seconds, recipe.test_seconds)
    frames = [round(length * recipe.sample_rate) for length in seconds]
    fraction = (recipe.valid + recipe.test) / sum(counts.values())
    longest = max(frames[1] if recipe.valid else 0, frames[2] if recipe.test else 0)
    sources: dict[Path, list[list[Any]]] = {
        speech_dir: _split_speech(speech_dir, fraction, recipe),
        noise_dir: _split_noise(noise_dir, fraction, recipe, (frames[0], longest)),
    }
    shared = {name: getattr(recipe, name) for name in ("sample_rate", "snr", "distance", "seed")}
    samples: list[Sample] = []
    for i, (name, count) in enumerate(counts.items()):
        speech, noise = (found[min(i, 1)] for found in sources.values())
        for folder, found in sources.items():
            if count and not found[min(i, 1)]:
                raise DataError(
                    f"too few files in {folder} ({len(found[0] + found[1])}) for {name}: add .wav "
                    f"or .flac files, or change --{name} or --valid_speakers"
                )
        folders = out_dir / name, speech_dir, noise_dir
        samples += draw_samples(Split(name, i, count, frames[i], *folders, **shared), speech, noise)
    return samples


def _split_speech(folder: Path, fraction: float, recipe: Recipe) -> list[list[str]]:
    """Divide speech files into those to train with and those held out, each list shuffled."""
    names = [path.relative_to(folder).as_posix() for path in audio.list_audio(folder)]
    speaker_of = _speakers(names)
    held = set(recipe.valid_speakers or ())
    if recipe.valid_speakers is None:
        held = set(_hold_out(sorted(set(speaker_of.values())), fraction, recipe.seed))
    elif unknown := sorted(held - set(speaker_of.values())):
        what = f"valid_speakers {unknown[0]!r} is not a speaker (or file) of {folder}"
        raise DataError(f"{what}: give such as {min(speaker_of.values(), default='none')}")
    order = np.random.default_rng([recipe.seed, 10]).permutation(len(names))
    parts: list[list[str]] = [[], []]
    for name in (names[i] for i in order):
        parts[speaker_of[name] in held].append(name)
    return parts


def _speakers(names: Sequence[str]) -> dict[str, str]:
    """Map each file to its speaker: the first folder level with two folders, else the file."""
    parts = {name: name.split("/") for name in names}
    for level in range(min(map(len, parts.values()), default=0)):
        folder_of = {name: p[level] for name, p in parts.items() if len(p) > level + 1}
        if len(set(folder_of.values())) >= 2:
            return {name: folder_of.get(name, name) for name in names}
    return {name: name for name in names}


def _split_noise(
    folder: Path, fraction: float, recipe: Recipe, frames: tuple[int, int]
) -> list[list[_Region]]:
    """Divide noise by file, or a single file by time; `frames` are both parts' clip lengths."""
    infos = [audio.read_info(path) for path in audio.list_audio(folder)]
    if len(infos) == 1 and fraction > 0:
        (only,) = infos
        # Valid gets its share of the time, but at least one clip's worth.
        least = _noise_frames(frames[1], recipe.sample_rate, only.sample_rate)
        cut = max(0, min(round(only.frames * (1 - fraction)), only.frames - least))
        parts = [[(only, 0, cut)], [(only, cut, only.frames)]]
    else:
        held = _hold_out(infos, fraction, recipe.seed)
        parts = [[(i, 0, i.frames) for i in infos if (i in held) == wanted] for wanted in (0, 1)]
    regions: list[list[_Region]] = [[], []]
    for part, count, found in zip(parts, frames, regions, strict=True):
        for info, start, stop in part:
            needed = _noise_frames(count, recipe.sample_rate, info.sample_rate)
            if stop - start < needed:
                raise DataError(
                    f"{info.path} offers {stop - start} samples, and a clip takes {needed}: "
                    "remove it, add longer noise, or lower --seconds"
                )
            found.append((info.path.relative_to(folder).as_posix(), start, stop))
    return regions


def _hold_out(items: Sequence[_Item], fraction: float, seed: int) -> list[_Item]:
    """Draw a fraction of the items: none if it is 0, else at least one, leaving at least one."""
    count = min(max(1, round(fraction * len(items))), len(items) - 1) if fraction and items else 0
    order = np.random.default_rng([seed, 11]).permutation(len(items))
    return [items[i] for i in sorted(order[:count])]


def _speech_excerpt(split: Split, path: Path, rng: np.random.Generator) -> Tensor:
    """Return [1, T] speech with energy in it: not a pause, unless the file holds only pauses."""
    wave, rate = audio.read_audio(path)
    wave = audio.resample(wave.mean(0, keepdim=True), rate, split.sample_rate)  # [1, whole file]
    if is_silent(wave):
        raise DataError(f"{path} is silent: remove it from the speech folder")
    spare = wave.shape[1] - split.frames
    if spare <= 0:
        return pad(wave, (0, -spare))
    # Energy of every possible excerpt at once, from differences of the running sum.
    running = pad(wave[0].double().square().cumsum(0), (1, 0))
    energy = (running[split.frames :] - running[: -split.frames]) / split.frames
    enough = _LOUD_ENOUGH**2 * float(running[-1]) / wave.shape[1]
    starts = rng.integers(spare + 1, size=_TRIES)
    loud = [int(start) for start in starts if float(energy[start]) >= enough]
    start = loud[0] if loud else int(energy.argmax())
    return wave[:, start : start + split.frames]


def _noise_excerpt(sample: Sample, rng: np.random.Generator) -> Tensor:
    """Return [1, T] noise from the split's part of the file; only what is needed is read."""
    split, (name, begin, end) = sample.split, sample.noise
    path = split.noise_dir / name
    rate = audio.read_info(path).sample_rate
    needed = _noise_frames(split.frames, split.sample_rate, rate)
    for _ in range(_TRIES):
        wave, _ = audio.read_audio(path, int(rng.integers(begin, end - needed + 1)), needed)
        if not is_silent(wave):
            break
    wave = audio.resample(wave.mean(0, keepdim=True), rate, split.sample_rate)
    skip = int(_RESAMPLING_MARGIN * split.sample_rate) if rate != split.sample_rate else 0
    return wave[:, skip : skip + split.frames]


def _noise_frames(frames: int, sample_rate: int, file_rate: int) -> int:
    """Return how many samples of a file make an excerpt: with a margin if it is resampled."""
    if file_rate == sample_rate:
        return frames
    return int(np.ceil((frames / sample_rate + 2 * _RESAMPLING_MARGIN) * file_rate))
