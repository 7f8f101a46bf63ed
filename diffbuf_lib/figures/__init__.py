"""Figures as pure functions: data in, a matplotlib Figure out; and players for pages.

Never pyplot: it is not thread-safe and keeps every figure.
"""

from diffbuf_lib.figures.players import Players, data_uri, player_wav
from diffbuf_lib.figures.progress import (
    compare_runs,
    curves,
    noise_schedule,
    scale_of,
    smooth,
    stream_course,
    training_progress,
)
from diffbuf_lib.figures.spectrogram import (
    buffer_spectra,
    spectra,
    spectrograms,
    to_jpeg,
    to_pixels,
    to_png,
)
from diffbuf_lib.figures.stages import gradients, stage, stepping

__all__ = [
    "Players",
    "buffer_spectra",
    "compare_runs",
    "curves",
    "data_uri",
    "gradients",
    "noise_schedule",
    "player_wav",
    "scale_of",
    "smooth",
    "spectra",
    "spectrograms",
    "stage",
    "stepping",
    "stream_course",
    "to_jpeg",
    "to_pixels",
    "to_png",
    "training_progress",
]
