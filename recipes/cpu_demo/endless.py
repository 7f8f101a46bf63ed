"""`--dataset_type 4`: speech files under generated noise; for `plugins`.

    plugins: [recipes.cpu_demo.endless]

Every speech file is one item. Noise, room, microphone, SNR and level are functions of (seed, epoch,
index), as in all datasets. Two families of noise are read from files: babble, from the speech files
themselves, and recordings in noise/, if there are any, played at a random speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data.audio import check_rate, list_audio, read_audio
from diffbuf_lib.data.datasets import ClipDataset, apply_crop, draw_crop, read_info
from diffbuf_lib.data.mixing import is_silent, tilt_spectrum
from diffbuf_lib.errors import DataError
from diffbuf_lib.registry import LAYOUTS
from recipes.cpu_demo.noise_families import (
    HELD_OUT,
    TRAINING,
    Array,
    draw_noise,
    microphone,
    random_room,
)

SNR = (
    -30.0,
    2.0,
    15.0,
)  # dB: lowest, most frequent, highest; SNRs at which speech can be found count most
PEAK_DB = (-40.0, 0.0)  # of a mixture, re full scale
ROOMS = 0.3  # share of clips whose speech is in a room
TILT = 3.0  # dB per octave, of the speech
TALKERS = (3, 9)  # of a babble
SPEED = 2.0  # recordings are played at up to this speed, and down to its inverse
_TRIES = 20


@LAYOUTS.register(4)
class EndlessMixtures(ClipDataset):
    """`speech/**` under generated noise; validation (not training) also uses `HELD_OUT`."""

    holds = "a folder speech/, maybe noise/, and noise that is drawn"
    parts = ("speech/",)

    def _find(self) -> Sequence[tuple[Path, ...]]:
        noise = self.root / "noise"
        self.recordings = list_audio(noise) if noise.is_dir() else []
        return [(path,) for path in list_audio(self.root / "speech")]

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        (path,) = self.items[index]
        speech = self._speech(path, rng)
        families = TRAINING | ({} if self.training else HELD_OUT) | {"babble": self._babble}
        if self.recordings:
            families["recorded"] = self._recorded
        noise = draw_noise(rng, self.chunk_size, self.sample_rate, families)
        snr_db = rng.triangular(*SNR)
        gain = np.sqrt(np.mean(speech**2)) * 10 ** (-snr_db / 20)  # noise has RMS 1
        mix, target = microphone(rng, speech, gain * noise, self.sample_rate)
        peak = max(np.abs(mix).max(), np.abs(target).max())
        scale = 10 ** (rng.uniform(*PEAK_DB) / 20) / peak
        return _wave(scale * mix), _wave(scale * target)

    def _speech(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        """Draw an excerpt that is not silent, with a random tilt, sometimes in a room: [T]."""
        frames = read_info(path).frames
        for _ in range(_TRIES):
            crop = draw_crop(frames, self.chunk_size, 0, rng if self.training else None)
            wave = apply_crop(path, crop, self.chunk_size)[:1]
            if not is_silent(wave):
                break
        else:
            raise DataError(f"{path} is silent in {_TRIES} drawn excerpts: remove it")
        if frames < self.chunk_size:  # else its end would always be silent
            wave = wave.roll(int(rng.integers(self.chunk_size - frames + 1)), dims=1)
        tilted = tilt_spectrum(wave, self.sample_rate, rng.uniform(-TILT, TILT))
        speech = tilted[0].double().numpy()
        return random_room(rng, speech, self.sample_rate) if rng.random() < ROOMS else speech

    def _babble(self, rng: np.random.Generator, samples: int, rate: int) -> Array:
        """Mix several speakers of the speech files, each at a random level."""
        total = np.zeros(samples)
        for index in rng.integers(len(self.items), size=int(rng.integers(*TALKERS))):
            level = 10 ** (rng.uniform(-12, 0) / 20)
            total += level * self._excerpt(self.items[index][0], rng, samples)
        return total

    def _recorded(self, rng: np.random.Generator, samples: int, rate: int) -> Array:
        """Play a recording at a random speed."""
        path = self.recordings[int(rng.integers(len(self.recordings)))]
        speed = SPEED ** rng.uniform(-1, 1)
        wave = self._excerpt(path, rng, int(samples * speed) + 2)
        return np.interp(speed * np.arange(samples), np.arange(len(wave)), wave)

    def _excerpt(self, path: Path, rng: np.random.Generator, samples: int) -> Array:
        """Draw an excerpt; a file that is too short is repeated: [samples]."""
        info = read_info(path)
        check_rate(info, self.sample_rate)
        crop = draw_crop(info.frames, samples, 0, rng)
        wave = read_audio(path, crop.start, crop.frames)[0][0].double().numpy()
        return np.resize(np.roll(wave, int(rng.integers(len(wave)))), samples)


def _wave(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(samples.astype(np.float32)).unsqueeze(0)
