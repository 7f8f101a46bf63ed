"""One validation: the loss and the scores of the first clips, shared out over the processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from diffbuf_lib.config import Config
from diffbuf_lib.training.metrics import mean_scores, score_clips
from diffbuf_lib.training.plan import Stream, example_generators, seed_everything
from diffbuf_lib.training.reading import ClipSource, read_batches


@dataclass(frozen=True)
class Validation:
    """What a validation came to.

    Args:
        values: "loss", every metric's mean, and `<metric>_clips`: how many clips it is over.
        example: mix, target and estimate of the first clip, each [T]; None on other processes.
    """

    values: dict[str, float]
    example: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


def validate(
    cfg: Config,
    model: nn.Module,
    dataset: ClipSource,
    accelerator: Accelerator,
    should_stop: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """Enhance and score the first `training.valid_clips` clips, in float32.

    Every clip has its own generator, seeded by (seed, clip): the same noise at every validation,
    whatever the batch size or the number of processes.

    Args:
        cfg: the config.
        model: the averaged model; is left in eval mode.
        dataset: the validation set, not empty.
        accelerator: process i of W takes every W-th clip.
        should_stop: asked before each batch.

    Returns:
        None when some process was asked to stop.

    Raises:
        DataError: a clip cannot be read; names it.
    """
    training, device = cfg.training, accelerator.device
    count, processes = min(training.valid_clips, len(dataset)), accelerator.num_processes
    mine = list(range(accelerator.process_index, count, processes))
    batches = [mine[i : i + training.batch_size] for i in range(0, len(mine), training.batch_size)]
    most = math.ceil(count / processes)  # clips of the first process: all exchange as often
    rounds = math.ceil(most / training.batch_size)
    reader = read_batches(dataset, batches)

    model.eval()
    seed_everything(training.seed, Stream.VALID)
    results: list[tuple[int, float, dict[str, float]]] = []
    example = None
    for round_ in range(rounds):
        flag = torch.tensor([float(should_stop())], device=device)
        if accelerator.gather(flag).any():
            return None
        if round_ >= len(batches):
            continue
        mix, target = (wave.to(device) for wave in next(reader))
        loss, estimate = _run_model(model, mix, target, batches[round_], training.seed)
        estimate, clean = estimate.mean(1).cpu(), target.mean(1).cpu()  # [B, T]
        scores = score_clips(estimate, clean, cfg.audio.sample_rate, training.metrics)
        for i, clip in enumerate(batches[round_]):
            results.append((clip, loss, {name: v[i].item() for name, v in scores.items()}))
        if round_ == 0 and accelerator.is_main_process:
            example = (mix[0].mean(0).cpu(), clean[0], estimate[0])
    return Validation(_average(_gathered(results, processes), training.metrics), example)


@torch.no_grad()
def _run_model(
    model: nn.Module, mix: torch.Tensor, target: torch.Tensor, clips: list[int], seed: int
) -> tuple[float, torch.Tensor]:
    """Return the mean loss and the estimates [B, C, T]."""
    keys = [(clip,) for clip in clips]
    generators = example_generators(keys, seed, Stream.VALID, mix.device)
    loss = model(mix, target, generator=generators).item()
    generators = example_generators(keys, seed, Stream.VALID, mix.device)
    return loss, model.enhance(mix, generator=generators)  # type: ignore[operator]


def _gathered(results: list[tuple[int, float, dict[str, float]]], processes: int) -> list:
    """Return all processes' results in the order of the clips, so that sums round alike."""
    everything = gather_object(results) if processes > 1 else results
    return sorted(everything, key=lambda result: result[0])


def _average(results: list, metrics: tuple[str, ...]) -> dict[str, float]:
    values = {"loss": sum(loss for _, loss, _ in results) / len(results)}
    scores = {name: torch.tensor([result[2][name] for result in results]) for name in metrics}
    for name, score in mean_scores(scores).items():
        values[name] = score.mean
        values[f"{name}_clips"] = float(score.scored)
    return values
