"""Figures of the notebooks, as pure functions: data in, a matplotlib Figure out.

Never pyplot: it is not thread-safe and keeps every figure.
"""

from diffbuf_lib.notebook.plots.buffer import (
    buffer_spectra,
    frame_counts,
    noise_along_buffer,
)
from diffbuf_lib.notebook.plots.faults import largest_values
from diffbuf_lib.notebook.plots.listening import delay_quality, frame_times, stream_course
from diffbuf_lib.notebook.plots.scaling import reading_costs, step_costs
from diffbuf_lib.notebook.plots.schedule import noise_schedule, score_limits
from diffbuf_lib.notebook.plots.signals import (
    compression,
    round_trip,
    snr_histogram,
    spectra,
    wave_spectra,
    waveforms,
)
from diffbuf_lib.notebook.plots.stages import stage
from diffbuf_lib.notebook.plots.statistics import (
    compare_gradients,
    correlation_map,
    loss_shares,
    precision_errors,
    score_quality,
    target_by_time,
    target_histogram,
)
from diffbuf_lib.notebook.plots.stepping import gradients, stepping
from diffbuf_lib.notebook.plots.training import compare_runs, training_progress

__all__ = [
    "buffer_spectra",
    "compare_gradients",
    "compare_runs",
    "compression",
    "correlation_map",
    "delay_quality",
    "frame_counts",
    "frame_times",
    "gradients",
    "largest_values",
    "loss_shares",
    "noise_along_buffer",
    "noise_schedule",
    "precision_errors",
    "reading_costs",
    "round_trip",
    "score_limits",
    "score_quality",
    "snr_histogram",
    "spectra",
    "stage",
    "step_costs",
    "stepping",
    "stream_course",
    "target_by_time",
    "target_histogram",
    "training_progress",
    "wave_spectra",
    "waveforms",
]
