"""Datasets as a user may bring them: other names, counts, lengths and channels than the demo's."""

from __future__ import annotations

from pathlib import Path

import torch

from diffbuf_lib.data import write_audio

RATE = 16000  # Hz


def make_paired_folder(
    root: Path, *, train: int = 5, valid: int = 3, channels: int = 1, seconds: float = 2.0
) -> Path:
    """Make `train/` and `valid/` with `clean/` and `noisy/` in each.

    Speech is a stand-in: harmonics of a gliding tone that come and go as syllables do, so that
    metrics of speech accept it.
    """
    generator = torch.Generator().manual_seed(1)
    for split, count in (("train", train), ("valid", valid)):
        for i in range(count):
            clean = _speech(int(seconds * RATE), 110 + 23 * i).expand(channels, -1)
            noise = torch.randn(clean.shape, generator=generator)
            noisy = clean + (0.02 + 0.02 * i) * noise
            for kind, wave in (("clean", clean), ("noisy", noisy)):
                folder = root / split / kind / f"talker {chr(97 + i)}"
                folder.mkdir(parents=True)
                write_audio(folder / f"take_{i}.wav", wave, RATE)
    return root


def _speech(samples: int, pitch: float) -> torch.Tensor:
    """[T] full scale 1: 20 harmonics of `pitch` Hz, four syllables a second."""
    seconds = torch.arange(samples) / RATE
    glide = pitch * (seconds + 0.05 * torch.sin(2 * torch.pi * seconds))
    tones = sum(torch.sin(2 * torch.pi * n * glide) / n for n in range(1, 21))
    syllables = torch.sin(4 * torch.pi * seconds).square()
    return 0.1 * syllables * tones
