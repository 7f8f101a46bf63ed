"""Which speech and which noise validation keeps to itself."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from diffbuf_lib.data.files import AudioInfo, list_audio, read_info
from diffbuf_lib.data.recipe import NoiseRegion, noise_frames
from diffbuf_lib.errors import DataError

_Item = TypeVar("_Item")


def split_speech(
    folder: Path, fraction: float, seed: int, held_out: Collection[str] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide speech files between training and the held-out splits, by speaker if possible.

    Args:
        folder: .wav or .flac files at any depth. The speakers are the first folder level at which
            there are at least two folders; with fewer than two, every file is its own speaker.
        fraction: of the speakers to hold out, 0..1; at least one if it is above 0.
        seed: of the division and of the order.
        held_out: names of the speakers to hold out; None draws them.

    Returns:
        Training and held-out files, relative to `folder`, each in a shuffled order.

    Raises:
        DataError: no files, too few to divide, or a held-out name that is none of the speakers.
    """
    names = [path.relative_to(folder).as_posix() for path in list_audio(folder)]
    if not names:
        raise DataError(f"speech folder {folder} holds no .wav or .flac file: check the path")
    speaker_of = _speakers(names)
    speakers = sorted(set(speaker_of.values()))
    if held_out is None:
        chosen = set(_hold_out(speakers, fraction, seed, f"speech files in {folder}"))
    else:
        chosen = set(held_out)
        unknown = sorted(chosen - set(speakers))
        if unknown:
            raise DataError(
                f"valid_speakers {unknown[0]!r} is none of the {len(speakers)} speakers in "
                f"{folder}, such as {speakers[0]!r}: name a folder (or file) that is there"
            )
        if fraction > 0 and not 0 < len(chosen) < len(speakers):
            raise DataError(
                f"valid_speakers names {len(chosen)} of the {len(speakers)} speakers in {folder}: "
                "leave at least one to train and one to valid"
            )
    rng = np.random.default_rng([seed, 10])
    shuffled = [names[i] for i in rng.permutation(len(names))]
    train = tuple(name for name in shuffled if speaker_of[name] not in chosen)
    return train, tuple(name for name in shuffled if speaker_of[name] in chosen)


def split_noise(
    folder: Path, fraction: float, seed: int, sample_rate: int, train_frames: int, other_frames: int
) -> tuple[tuple[NoiseRegion, ...], tuple[NoiseRegion, ...]]:
    """Divide noise between training and the held-out splits: by file, or one file by time.

    Args:
        folder: .wav or .flac files at any depth.
        fraction: of the files (or of the one file's time) to hold out, 0..1.
        seed: of the division.
        sample_rate: Hz, of the dataset.
        train_frames: samples of a training clip at `sample_rate`.
        other_frames: samples of the longest held-out clip at `sample_rate`.

    Returns:
        The parts of files for training and those for the held-out splits.

    Raises:
        DataError: no files, or one that is shorter than the clips; remove it or shorten the clips.
    """
    infos = [read_info(path) for path in list_audio(folder)]
    if not infos:
        raise DataError(f"noise folder {folder} holds no .wav or .flac file: check the path")
    cuts: list[list[tuple[AudioInfo, int, int]]]
    if fraction == 0:
        cuts = [[(info, 0, info.frames) for info in infos], []]
    elif len(infos) == 1:
        # Time to valid in proportion, but at least one clip's worth to it.
        least = noise_frames(other_frames, sample_rate, infos[0].sample_rate)
        cut = min(round(infos[0].frames * (1 - fraction)), infos[0].frames - least)
        cuts = [[(infos[0], 0, cut)], [(infos[0], max(cut, 0), infos[0].frames)]]
    else:
        held = {info.path for info in _hold_out(infos, fraction, seed, f"noise files in {folder}")}
        cuts = [
            [(info, 0, info.frames) for info in infos if (info.path in held) == wanted]
            for wanted in (False, True)
        ]
    train, other = (
        tuple(_region(folder, *cut, frames, sample_rate) for cut in part)
        for part, frames in zip(cuts, (train_frames, other_frames), strict=True)
    )
    return train, other


def _region(
    folder: Path, info: AudioInfo, start: int, stop: int, frames: int, sample_rate: int
) -> NoiseRegion:
    """Return a part of a noise file, checked to be long enough for a clip."""
    needed = noise_frames(frames, sample_rate, info.sample_rate)
    if stop - start < needed:
        raise DataError(
            f"noise file {info.path} offers {max(stop - start, 0) / info.sample_rate:.2f} s, "
            f"fewer than the {needed / info.sample_rate:.2f} s that a clip takes: remove it, add "
            "longer noise, or lower --seconds (--test_seconds)"
        )
    return NoiseRegion(info.path.relative_to(folder).as_posix(), start, stop)


def _speakers(names: list[str]) -> dict[str, str]:
    """Map each file to its speaker: the first folder level with two folders, else the file."""
    parts = {name: PurePosixPath(name).parts for name in names}
    level = 0
    while True:
        folders = {part[level] for part in parts.values() if len(part) > level + 1}
        if len(folders) >= 2:
            return {
                name: part[level] if len(part) > level + 1 else name for name, part in parts.items()
            }
        if not folders or any(len(part) == level + 1 for part in parts.values()):
            return {name: name for name in names}
        level += 1


def _hold_out(items: list[_Item], fraction: float, seed: int, what: str) -> list[_Item]:
    """Draw a fraction of the items, at least one, leaving at least one."""
    if fraction == 0:
        return []
    if len(items) < 2:
        raise DataError(
            f"there are too few {what} ({len(items)}) to keep train and valid apart: add files, "
            "or set --valid 0"
        )
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    rng = np.random.default_rng([seed, 11])
    return [items[i] for i in sorted(rng.permutation(len(items))[:count])]
