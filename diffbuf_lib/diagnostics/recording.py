"""Look over training's shoulder: the stages of the batches that it really trains on.

`RecordingModel` is the same model with the same weights; it hands every training batch's trace to
a listener before the backward pass, so that even a step that fails has been seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.diffusion.buffer import Generators
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.trace import Summary, Trace

_STAGES = ("mix", "target", "Y", "V", "t", "sigma", "target_score", "score")


class RecordingModel(DiffusionBufferModel):
    """A model that tells a listener about every training batch.

    Args:
        cfg: as for `DiffusionBufferModel`; the weights are those that `train` would begin with.
        listener: called with each trace (detached), while the model is in training mode.
    """

    def __init__(self, cfg: Config, listener: Callable[[Trace], None] | None = None) -> None:
        from diffbuf_lib.training.isolation import isolated
        from diffbuf_lib.training.plan import Stream, seed_everything

        with isolated(torch.device("cpu"), deterministic=False):
            seed_everything(cfg.training.seed, Stream.WEIGHTS)
            super().__init__(cfg)
        self.listener = listener

    def trace(self, mix: Tensor, target: Tensor, generator: Generators = None) -> Trace:
        """As in `DiffusionBufferModel`."""
        trace = super().trace(mix, target, generator)
        if self.listener is not None and self.training and torch.is_grad_enabled():
            stages = {f.name: getattr(trace, f.name).detach() for f in dataclasses.fields(trace)}
            self.listener(Trace(**stages))
        return trace


class StageRecorder:
    """Keeps the last training batch's trace; says its shapes once and its numbers now and then.

    Args:
        cfg: the config.
        say: told lines to print.
        shapes: whether to describe the first batch.
        every: steps from one report of numbers to the next; 0 for none.
        board: folder for a TensorBoard run of its own, beside the run's.
        resumed: whether the run goes on: then points of later steps are dropped from the board.
    """

    def __init__(
        self,
        cfg: Config,
        say: Callable[[str], None],
        *,
        shapes: bool = False,
        every: int = 0,
        board: Path | None = None,
        resumed: bool = False,
    ) -> None:
        self.cfg, self.say, self.every = cfg, say, every
        self.board_path, self.resumed = board, resumed
        self.last: Trace | None = None
        self._shapes_due = shapes
        self._board: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # the averaged copy of a model has the same listener

    def __call__(self, trace: Trace) -> None:
        """Take note of a batch."""
        self.last = trace
        if self._shapes_due:
            self._shapes_due = False
            self.say(describe_shapes(trace, self.cfg))

    def step(self, step: int) -> None:
        """Report the numbers of the last batch if step `step`, from 1, is one of the N-th."""
        if not self.every or step % self.every or self.last is None:
            return
        summary = self.last.summary()
        self.say(f"step {step}\n{summary}")
        if self.board_path is not None:
            self._write(summary, step)

    def close(self) -> None:
        """Close the board."""
        if self._board is not None:
            self._board.close()

    def _write(self, summary: Summary, step: int) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = step if self.resumed else None
            self._board = SummaryWriter(str(self.board_path), purge_step=purge)
        for row in summary:
            for name in ("min", "max", "mean", "std", "zeros", "nan", "inf"):
                value = float(getattr(row, name))
                if math.isfinite(value):
                    self._board.add_scalar(f"stats/{row.name}/{name}", value, step)


def describe_shapes(trace: Trace, cfg: Config) -> str:
    """Return a table of the first batch: shapes, types, devices, frames, ranges.

    Args:
        trace: of a batch.
        cfg: the config it ran with.
    """
    summary = trace.summary()
    rows = Summary(tuple(summary[name] for name in _STAGES))
    frames, Kb = trace.Y.shape[-1], trace.t.shape[-1]
    ranges = ", ".join(
        f"{name} {summary[stage].min:.4g} to {summary[stage].max:.4g}"
        for name, stage in (
            ("t", "t"),
            ("sigma", "sigma"),
            ("|score target|", "target_score"),
            ("|score|", "score"),
        )
    )
    return (
        f"first batch: {frames} frames of {trace.Y.shape[-2]} bins, buffer_size {Kb}, "
        f"K {cfg.num_frames} online, loss {trace.loss.item():.4g}\n{rows}\n{ranges}"
    )
