"""Small DN-LM splits, good or broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from diffbuf_lib import Config
from diffbuf_lib.config import build_config
from diffbuf_lib.data import open_dataset
from tests.conftest import TINY

RATE = 16000


def config(*overrides: str) -> Config:
    return build_config(TINY, overrides)


def write(path: Path, wave: np.ndarray, subtype: str = "FLOAT") -> None:
    """Write [T] or [T, C] as it is, NaN and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE, subtype=subtype)


def make_split(root: Path, count: int = 4, seed: int = 0, length: int = 1600) -> Path:
    """Make a split whose clips are white noise (target) in white noise, SNR -6 dB."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        target, noise = 0.05 * rng.standard_normal((2, length)) * np.array([[1], [2]])
        folder = root / f"sample_{i:05}"
        write(folder / "vocals.wav", target)
        write(folder / "noise.wav", noise)
        write(folder / "mixture.wav", target + noise)
    return root


def stem(root: Path, name: str, clip: int = 1) -> Path:
    return root / f"sample_{clip:05}" / f"{name}.wav"


def samples(path: Path) -> np.ndarray:
    return soundfile.read(path)[0]


def opened(root: Path, cfg: Config, *, training: bool = True):
    return open_dataset(1, root, cfg, training=training)
