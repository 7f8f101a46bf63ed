"""Watch a model while it runs: every module's output, the gradients, the batches it trains on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffbuf_lib.config import Config
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.trace import StageSummary, Summary, Trace, format_table, summarise
from diffbuf_lib.training.feed import Stream, seed_everything
from diffbuf_lib.training.signals import isolated

_FIRST_BATCH = ("mix", "target", "Y", "V", "t", "sigma", "target_score", "score")
_NUMBERS = ("min", "max", "mean", "std", "zeros", "nan", "inf")


class _BadValueError(Exception):
    """Ends the watched block."""


@dataclass
class ModuleWatch:
    """What the modules of a model put out, in the order in which they finished.

    Attributes:
        visits: a row for every output tensor of every call: name, shape, dtype, range, and the
            elements that are NaN or Inf.
        gradients: names of modules (their outputs) and parameters, with the number of elements
            that are NaN or Inf in the gradient, from the loss backwards; only if asked for.
        calls: how often each module ran.
        first_nonfinite: name of the first module that put out a NaN or an infinity; a module
            finishes before the one that contains it. None if there was none.
        inputs_were_finite: whether that module's inputs were finite: then it, or its weights, made
            the bad value; if not, it came from outside of all modules.
    """

    visits: list[StageSummary] = dataclasses.field(default_factory=list)
    gradients: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    first_nonfinite: str | None = None
    inputs_were_finite: bool | None = None

    @property
    def outputs(self) -> Summary:
        """A row for every module that put out a tensor; of its last call."""
        return Summary(tuple({row.name: row for row in self.visits}.values()))


@contextmanager
def watch_modules(
    model: nn.Module, *, statistics: bool = True, gradients: bool = False, stop: bool = False
) -> Iterator[ModuleWatch]:
    """Watch all modules of a model while a block runs.

    Args:
        model: any module; hooks are put on it and taken off again, whatever happens.
        statistics: whether to note a row for every output; else only its finiteness is looked at,
            which costs less.
        gradients: whether to note the gradients of a backward pass within the block too.
        stop: whether the block ends, without an exception, at the first output that is not finite.

    Yields:
        What was seen, filled as the model runs and still there after the block.
    """
    watch, handles = ModuleWatch(), []

    def note(name: str, gradient: Tensor) -> None:
        watch.gradients.append((name, int((~gradient.isfinite()).sum())))

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        watch.calls[name] = watch.calls.get(name, 0) + 1
        tensors = list(_tensors(output))
        for i, tensor in enumerate(tensors if statistics else ()):
            label = name if len(tensors) == 1 else f"{name}[{i}]"
            watch.visits += summarise({label: tensor})
        for tensor in tensors if gradients else ():
            if tensor.requires_grad:
                handles.append(tensor.register_hook(partial(note, name)))
        if watch.first_nonfinite is None and not all(map(is_finite, tensors)):
            watch.first_nonfinite = name
            watch.inputs_were_finite = all(map(is_finite, _tensors((args, kwargs))))
            if stop:
                raise _BadValueError

    try:
        for name, module in model.named_modules():
            hook = partial(see, name or type(model).__name__)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, parameter in model.named_parameters() if gradients else ():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(partial(note, name)))
        with suppress(_BadValueError):
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite: the extremes are, which carry a NaN along."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return bool(values.amin().isfinite() & values.amax().isfinite())


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(value)


@dataclass(frozen=True)
class GradientRow:
    """Gradients of one module's own parameters, without those of the modules inside it."""

    module: str
    parameters: int  # numbers that have a gradient
    missing: int  # numbers that have none: the loss does not depend on them
    norm: float
    max: float  # largest magnitude
    zeros: float  # share, 0 to 1
    nonfinite: int  # elements that are NaN or Inf
    weight_norm: float  # of the parameters themselves


@dataclass(frozen=True)
class GradientStatistics:
    """A row for every module that owns parameters; prints as a table."""

    rows: tuple[GradientRow, ...]

    def __iter__(self) -> Iterator[GradientRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, module: str) -> GradientRow:
        return {row.module: row for row in self.rows}[module]

    @property
    def norm(self) -> float:
        """Norm of all gradients together."""
        return math.sqrt(sum(row.norm**2 for row in self.rows))

    def __str__(self) -> str:
        table = [
            ["module", "parameters", "missing", "norm", "max", "zeros", "not finite", "weights"]
        ]
        for row in self.rows:
            counts = [str(row.parameters), str(row.missing)]
            numbers = [f"{row.norm:.3g}", f"{row.max:.3g}", f"{row.zeros:.1%}"]
            last = [str(row.nonfinite), f"{row.weight_norm:.3g}"]
            table.append([row.module, *counts, *numbers, *last])
        return format_table(table)


def gradient_statistics(model: nn.Module) -> GradientStatistics:
    """Measure the gradients that the last backward pass left, module by module.

    Args:
        model: any module; call this after `backward` and before `zero_grad`.
    """
    counts: list[tuple[str, int, int]] = []
    numbers: list[Tensor] = []  # [5] each; all of them travel to the CPU in one copy
    for name, module in model.named_modules():
        own = [p.detach() for p in module.parameters(recurse=False)]
        if not own:
            continue
        gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
        present = sum(g.numel() for g in gradients)
        counts.append(
            (name or type(model).__name__, present, sum(p.numel() for p in own) - present)
        )
        numbers.append(_gradient_numbers(own, gradients))
    rows = []
    table = torch.stack(numbers).tolist() if numbers else []
    for (name, present, missing), values in zip(counts, table, strict=True):
        norm, largest, zeros, nonfinite, weights = values
        share = zeros / present if present else 0.0
        rows.append(
            GradientRow(name, present, missing, norm, largest, share, int(nonfinite), weights)
        )
    return GradientStatistics(tuple(rows))


def _gradient_numbers(parameters: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Return [5] float32: norm, largest magnitude, zeros, NaN or Inf, norm of the parameters."""
    weights = torch.stack([p.float().norm() for p in parameters]).norm()
    if not gradients:
        return torch.stack([*weights.new_zeros(4), weights])
    flat = torch.cat([g.float().flatten() for g in gradients])
    largest = torch.maximum(flat.amax(), -flat.amin())
    counts = [(flat == 0).sum().float(), (~flat.isfinite()).sum().float()]
    return torch.stack([flat.norm(), largest, *counts, weights])


class RecordingModel(DiffusionBufferModel):
    """A model that shows every training batch to a listener before the backward pass.

    So a step that fails has been seen, too.

    Args:
        cfg: as for `DiffusionBufferModel`; the weights are those that `train` would begin with.
        listener: called with each trace (detached), while the model is in training mode.
    """

    def __init__(self, cfg: Config, listener: Callable[[Trace], None] | None = None) -> None:
        with isolated(torch.device("cpu"), deterministic=False):
            seed_everything(cfg.training.seed, Stream.WEIGHTS)
            super().__init__(cfg)
        self.listener = listener

    def trace(self, *args: Any, **kwargs: Any) -> Trace:
        """As in `DiffusionBufferModel`."""
        trace = super().trace(*args, **kwargs)
        if self.listener is not None and self.training and torch.is_grad_enabled():
            self.listener(trace.detach())
        return trace


class StageRecorder:
    """Keeps the last training batch's trace; tells its shapes once and its numbers now and then.

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
            self.say(_describe_first(trace, self.cfg))

    def step(self, step: int) -> None:
        """Report the numbers of the last batch if step `step`, from 1, is one of the N-th."""
        if not self.every or step % self.every or self.last is None:
            return
        summary = self.last.summary()
        self.say(f"step {step}\n{summary}")
        if self.board_path is None:
            return
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            purge = step if self.resumed else None
            self._board = SummaryWriter(str(self.board_path), purge_step=purge)
        for row, name in ((row, name) for row in summary for name in _NUMBERS):
            if math.isfinite(getattr(row, name)):
                self._board.add_scalar(f"stats/{row.name}/{name}", getattr(row, name), step)

    def close(self) -> None:
        """Close the board."""
        if self._board is not None:
            self._board.close()


def _describe_first(trace: Trace, cfg: Config) -> str:
    """Return a table of the first batch: shapes, types, devices, frames, ranges."""
    summary = trace.summary()
    named = {"t": "t", "sigma": "sigma", "|score target|": "target_score", "|score|": "score"}
    ranges = (f"{k} {summary[v].min:.4g} to {summary[v].max:.4g}" for k, v in named.items())
    bins, frames = trace.Y.shape[-2:]
    return (
        f"first batch: {frames} frames of {bins} bins, buffer_size {trace.t.shape[-1]}, "
        f"K {cfg.num_frames} online, loss {trace.loss.item():.4g}\n"
        f"{Summary(tuple(summary[name] for name in _FIRST_BATCH))}\n{', '.join(ranges)}"
    )
