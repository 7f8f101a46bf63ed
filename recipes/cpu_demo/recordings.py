"""Recorded speech and noise under free licences, from public repositories, as 16 kHz FLAC.

    python -m recipes.cpu_demo.recordings --out DIR                    # fetches them by git
    python -m recipes.cpu_demo.recordings --out DIR --clones FOLDER    # from FOLDER/NAME, as cloned

Writes DIR/{speech,noise}/NAME/. What cannot be fetched is reported and left out; existing files
are kept.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffbuf_lib.data.audio import read_audio, resample, write_audio
from diffbuf_lib.errors import DataError

RATE = 16000  # Hz
_PEAK = 0.8
_SHORTEST = 0.5  # s
_CLIPPED = 30  # samples at full scale: more than a peak


@dataclass(frozen=True)
class Source:
    """A repository on GitHub, and which of its files are taken."""

    repository: str
    licence: str
    part: str  # speech or noise
    files: Callable[[Path], Iterator[Path]]
    pauses: float = (
        0.0  # dB below the speech that a file's pauses are, or its noise would be learnt
    )


def _kerstin(clone: Path) -> Iterator[Path]:
    # One woman, 106 minutes: only a quarter is used, or every third training clip would be hers.
    yield from sorted(clone.rglob("*.flac"))[::4]


def _precise(clone: Path) -> Iterator[Path]:
    """Yield the files that their speakers have put into the public domain."""
    texts = [path.read_text(errors="replace") for path in clone.glob("licenses/license-2*")]
    named = {Path(name).name for text in texts for name in re.findall(r"[\w./-]+\.wav", text)}
    for path in sorted(clone.rglob("*.wav")):
        if path.name in named and "noises" not in path.parts:
            yield path


def _propeller(clone: Path) -> Iterator[Path]:
    yield from sorted((clone / "clips" / "prop").rglob("*.wav"))


SOURCES = {
    "kerstin": Source("rhasspy/dataset-voice-kerstin", "CC0 1.0", "speech", _kerstin),
    "precise": Source(
        "MycroftAI/Precise-Community-Data", "public domain", "speech", _precise, 45.0
    ),
    "propeller": Source("grigoriev-vladimir/drone-audio-dataset", "MIT", "noise", _propeller),
}


def range_of(wave: Tensor) -> float:
    """Return the 95th minus the 5th percentile of the level in 20 ms of [1, T] at RATE, dB."""
    frames = wave[0].unfold(0, RATE // 50, RATE // 50).square().mean(1).clamp_min(1e-10)
    low, high = torch.quantile(10 * frames.log10(), torch.tensor([0.05, 0.95])).tolist()
    return float(high - low)


def prepare(path: Path, pauses: float) -> Tensor | None:
    """Return [1, T] at RATE; None if it is truncated, short, silent, clipped or noisy."""
    try:
        wave, rate = read_audio(path)
    except DataError:
        return None
    wave = resample(wave.mean(0, keepdim=True), rate, RATE)
    peak = float(wave.abs().max())
    clipped = peak > 0.98 and int((wave.abs() > 0.99 * peak).sum()) > _CLIPPED
    if wave.shape[1] < _SHORTEST * RATE or peak < 1e-3 or clipped or range_of(wave) < pauses:
        return None
    return wave * (_PEAK / peak)


def fetch(source: Source, clones: Path, say: Callable[[str], None]) -> Path | None:
    """Return a clone of the repository, made if it is not there; None if that fails."""
    clone = clones / Path(source.repository).name
    if not clone.is_dir():
        address = f"https://github.com/{source.repository}"
        temporary = clone.with_name(f".{clone.name}.tmp")  # until it is complete
        shutil.rmtree(temporary, ignore_errors=True)
        command = ["git", "clone", "--quiet", "--depth", "1", address, str(temporary)]
        environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        try:
            subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or str(error)
            say(f"left out: {source.repository} ({why.strip()[-120:]})")
            return None
        temporary.rename(clone)
    return clone


def gather(out: Path, clones: Path, say: Callable[[str], None] = print) -> None:
    """Make the folders of all sources that are available; `say` is called for each."""
    for name, source in SOURCES.items():
        folder = out / source.part / name
        if folder.exists() or (clone := fetch(source, clones, say)) is None:
            continue
        temporary = folder.with_name(f".{name}.tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        seconds = 0.0
        for path in source.files(clone):
            if (wave := prepare(path, source.pauses)) is not None:
                write_audio(temporary / f"{path.stem}.flac", wave, RATE)
                seconds += wave.shape[1] / RATE
        if not seconds:
            say(f"left out: {source.repository} has no file to take")
            continue
        temporary.rename(folder)
        say(f"{folder}: {seconds / 60:.0f} min, {source.licence}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the products")
    parser.add_argument("--clones", type=Path, help="where the repositories are or will be cloned")
    given = parser.parse_args()
    gather(given.out, given.clones or given.out / "clones")
