from pathlib import Path

import numpy as np
import pytest
import torch

from diffbuf_lib.data import write_audio
from recipes.demo.drone import DroneParameters, synthesise

RATE = 16000


def save(path, wave, rate=RATE, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, torch.as_tensor(wave, dtype=torch.float32), rate, subtype)
    return path


def content(folder):
    """The bytes of every file below a folder, by name."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def noise_wave(seed, samples, channels=1, level=0.1):
    """White noise: every crop of it is different from every other."""
    wave = np.random.default_rng(seed).normal(size=(channels, samples)) * level
    return torch.from_numpy(wave.clip(-0.99, 0.99).astype(np.float32))


@pytest.fixture
def make_dnlm(tmp_path):
    """Make a DN-LM split whose sample i has lengths[i] samples; mix - target is in noise.wav."""

    def make(lengths, channels=1, rate=RATE, root=None) -> Path:
        root = root or tmp_path / "dnlm"
        for i, length in enumerate(lengths):
            target = torch.round(noise_wave(2 * i, length, channels) * 32768) / 32768
            noise = torch.round(noise_wave(2 * i + 1, length, channels) * 32768) / 32768
            folder = root / f"sample_{i:05d}"
            save(folder / "mixture.wav", target + noise, rate, "FLOAT")
            save(folder / "vocals.wav", target, rate)
            save(folder / "noise.wav", noise, rate)
        return root

    return make


@pytest.fixture
def sources(tmp_path):
    """Speech of four speakers (22.05 kHz and 16 kHz) with long pauses, and three drones."""
    speech, noise = tmp_path / "speech", tmp_path / "noise"
    for speaker in range(4):
        for number in range(2):
            rate = 22050 if speaker == 1 else RATE
            wave = noise_wave(10 * speaker + number, 3 * rate, level=0.2)
            wave[:, : 2 * rate] = 0  # a pause of 2 s: most crops of 0.5 s are silent
            suffix = "flac" if number else "wav"
            save(speech / f"spk{speaker}" / "ch" / f"{number}.{suffix}", wave, rate)
    for number in range(3):
        rate = 44100 if number == 1 else RATE
        rng = np.random.default_rng(number)
        drone = synthesise(DroneParameters.draw(rng), 2 * rate, rate, rng)
        save(noise / f"drone{number}.wav", 0.9 * drone, rate)
    return speech, noise
