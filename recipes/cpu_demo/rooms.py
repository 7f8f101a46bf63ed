"""Impulse responses of rooms, by the image-source method."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.errors import MissingExtraError


def draw_response(rng: np.random.Generator, sample_rate: int) -> Tensor:
    """Synthesise the impulse response of a shoebox room.

    From 3 m x 3 m to 10 m x 8 m, reverberation times of 0.1 to 0.5 s, the talker 0.5 to 3 m away.

    Args:
        rng: where randomness comes from.
        sample_rate: Hz.

    Returns:
        [N] float32; the direct sound is at sample 0 and has a peak of 1.

    Raises:
        MissingExtraError: pyroomacoustics is not installed.
    """
    try:
        import pyroomacoustics as pra
    except ImportError as error:
        raise MissingExtraError(
            "rooms need the package pyroomacoustics, which is not installed: "
            "pip install 'diffbuf[pretraining]'"
        ) from error
    size = rng.uniform([3, 3, 2.4], [10, 8, 4])
    shortest = 0.161 * np.prod(size) / (2 * (size[0] * size[1] + size[2] * (size[0] + size[1])))
    seconds = max(rng.uniform(0.1, 0.5), 1.05 * shortest)  # Sabine: absorption of 1 at most
    absorption, order = pra.inverse_sabine(seconds, size)
    room = pra.ShoeBox(
        size, fs=sample_rate, materials=pra.Material(absorption), max_order=min(order, 12)
    )
    microphone = rng.uniform(0.3 * size, 0.7 * size)
    distance, angle = rng.uniform(0.5, 3.0), rng.uniform(0, 2 * math.pi)
    talker = microphone + distance * np.array([math.cos(angle), math.sin(angle), 0])
    room.add_source(np.clip(talker, 0.2, size - 0.2))
    room.add_microphone(microphone)
    room.compute_rir()
    response = torch.tensor(np.asarray(room.rir[0][0]), dtype=torch.float32)
    start = int(response.abs().argmax())
    return response[start:] / response[start]
