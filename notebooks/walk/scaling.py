"""What a step costs: time and memory against batch size and precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from diffbuf_lib.config import Config
from diffbuf_lib.data import collate
from diffbuf_lib.diagnostics.checks_run import run_pass
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.trace import format_table
from diffbuf_lib.training.feed import ClipSource, EpochPlan

# Overrides with which a step of any config takes a fraction of a second.
SMALL = (
    "model={name: block_causal, base_channels: 8, channel_multipliers: [1, 2]}",
    "diffusion_buffer={buffer_size: 8, num_frames: 32}",
    "training={loss: weighted_score, batch_size: 4, lr: 1.0e-3, use_amp: false, num_workers: 0}",
)
_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST = 2.0  # seconds; a step that takes longer is not repeated


class StepCost(NamedTuple):
    """The cost of the forward and backward pass of one batch."""

    batch_size: int  # clips
    precision: str  # float32, bfloat16 or float16
    seconds: float  # the shortest of the repetitions
    saved_bytes: int  # what the forward pass keeps for the backward pass
    loss: float
    grad_norm: float  # of all gradients together

    @property
    def clips_per_second(self) -> float:
        """Clips processed per second."""
        return self.batch_size / self.seconds


def step_costs(
    model: DiffusionBufferModel,
    clips: ClipSource,
    batch_sizes: Sequence[int],
    *,
    precision: str = "float32",
    repeats: int = 3,
) -> list[StepCost]:
    """Measure training passes with the same weights, noise and clips; nothing is updated.

    The model must have trained a little: the last layers of a new one are zero, and then so is
    everything that precision (float32, bfloat16, float16) could change. A slow pass is run once.
    """
    device = next(model.parameters()).device
    costs = []
    for size in batch_sizes:
        mix, target = collate([clips[i % len(clips)] for i in range(size)])
        mix, target = mix.to(device), target.to(device)
        passes = [run_pass(model, mix, target, _DTYPES[precision])]
        if passes[0].seconds < _LONGEST:
            passes += [run_pass(model, mix, target, _DTYPES[precision]) for _ in range(repeats)]
        last, seconds = passes[-1], min(each.seconds for each in passes)
        costs.append(
            StepCost(size, precision, seconds, last.saved.total, last.loss, last.grad_norm)
        )
    return costs


def cost_table(costs: Sequence[StepCost]) -> str:
    """Return the costs as a table, one line each."""
    rows = [["precision", "batch", "ms/pass", "clips/s", "MiB", "loss"]]
    for cost in costs:
        numbers = (1000 * cost.seconds, cost.clips_per_second, cost.saved_bytes / 2**20)
        shown = [f"{number:.1f}" for number in numbers]
        rows.append([cost.precision, str(cost.batch_size), *shown, f"{cost.loss:.5f}"])
    return format_table(rows)


def run_hours(plan: EpochPlan, epochs: int, seconds_per_step: float) -> float:
    """Return the hours that so many epochs take, validation not counted."""
    return epochs * plan.steps * seconds_per_step / 3600


def plan_of(cfg: Config, clips: int) -> EpochPlan:
    """Return how an epoch of so many clips is split into batches for one process."""
    training = cfg.training
    return EpochPlan(clips, training.batch_size, training.accumulation_steps, 1, training.seed)
