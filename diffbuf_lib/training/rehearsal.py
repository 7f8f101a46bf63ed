"""Trial steps of a run, which leave nothing behind, and a learning rate range test with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import feed
from diffbuf_lib.training.folder import apply_weights, load_weights
from diffbuf_lib.training.run import make_plan
from diffbuf_lib.training.signals import isolated
from diffbuf_lib.training.step import Engine, fastest_format, make_accelerator

LR_RANGE = (1e-6, 1.0)
_FEWEST = 10  # steps of a range test


Read = tuple[tuple[Tensor, Tensor], int, int]  # mix and target on the CPU, epoch, round


class Rehearsal(NamedTuple):
    """What a run would begin with, in one process."""

    engine: Engine
    feed: feed.Feed

    def read(self) -> Iterator[Read]:
        """Yield the arguments of `Feed.batch` for every batch, without end."""
        for epoch in itertools.count():
            for round_, waves in enumerate(self.feed.read(epoch)):
                yield waves, epoch, round_


@contextmanager
def rehearsal(
    cfg: Config, train_set: feed.ClipSource, device: str, start_check_point: Path | None = None
) -> Iterator[Rehearsal]:
    """Build what `train` would; at the end, restore the global generators and flags."""
    training, accelerator = cfg.training, make_accelerator(cfg.training, device)
    plan = make_plan(training, len(train_set), 1, None)
    with isolated(accelerator.device, deterministic=training.deterministic):
        memory_format, _ = fastest_format(cfg, accelerator)
        feed.seed_everything(training.seed, feed.Stream.WEIGHTS)
        model = DiffusionBufferModel(cfg)
        if start_check_point is not None:
            apply_weights(model, load_weights(start_check_point), start_check_point)
        model.set_memory_format(memory_format)
        engine = Engine(cfg, model, accelerator, total_steps=plan.steps)
        reader = feed.ClipReader(train_set, training.num_workers)
        yield Rehearsal(engine, feed.Feed(reader, plan, 0, accelerator.device))


class RangeTest(NamedTuple):
    """Rising learning rates, and the loss after a step with each."""

    lrs: list[float]
    losses: list[float]  # of one batch with one noise, always the same

    @property
    def smoothed(self) -> list[float]:
        """The mean of each loss and its neighbours."""
        padded = np.pad(self.losses, 1, mode="edge")
        smoothed: list[float] = np.convolve(padded, np.ones(3) / 3, mode="valid").tolist()
        return smoothed

    @property
    def lowest(self) -> int:
        """Index of the lowest loss: larger rates make it worse."""
        return int(np.argmin(self.smoothed))

    @property
    def proposed(self) -> float | None:
        """The rate, to two digits, at which the loss falls fastest; None if it does not fall."""
        falls = np.diff(self.smoothed[: self.lowest + 1])
        if not len(falls) or falls.min() >= 0:
            return None
        return float(f"{self.lrs[int(np.argmin(falls))]:.1e}")


def find_lr(
    cfg: Config,
    train_set: feed.ClipSource,
    device: str = "auto",
    *,
    start_check_point: Path | None = None,
    steps: int = 100,
    progress: Callable[[Iterator[int]], Iterator[int]] = iter,
) -> RangeTest:
    """Raise the learning rate from step to step, over one epoch at most, until the loss explodes.

    After Smith 2017 (arXiv 1506.01186), but the loss is always that of one batch with the same
    diffusion times and noise: the loss of each step's own examples varies by more than it falls.
    ConfigError for an epoch of too few steps.
    """
    with rehearsal(cfg, train_set, device, start_check_point) as stage:
        engine, plan = stage.engine, stage.feed.plan
        if (steps := min(steps, plan.steps)) < _FEWEST:
            what = f"an epoch of {plan.size} clips has {steps} steps, and {_FEWEST} are needed"
            raise ConfigError(f"{what}: lower training.batch_size {cfg.training.batch_size}")
        batches = stage.read()
        probe = next(batches)
        result = RangeTest([], [])
        first = best = _loss(stage, probe)
        for step, lr in enumerate(progress(iter(np.geomspace(*LR_RANGE, steps)))):
            for group in engine.optimizer.param_groups:
                group["lr"] = float(lr)
            feed.seed_everything(cfg.training.seed, feed.Stream.STEP, step, 0)  # for dropout
            engine.step([stage.feed.batch(*next(batches)) for _ in range(plan.accumulation)])
            loss = _loss(stage, probe)
            if not math.isfinite(loss) or loss > first + max(3 * (first - best), abs(first)):
                break
            best = min(best, loss)
            result.lrs.append(float(lr))
            result.losses.append(loss)
    return result


@torch.no_grad()
def _loss(stage: Rehearsal, probe: Read) -> float:
    batch, model = stage.feed.batch(*probe), stage.engine.model.eval()
    return float(model(batch.mix, batch.target, generator=batch.generators))
