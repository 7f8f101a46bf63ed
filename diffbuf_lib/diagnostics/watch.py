"""Watch a model while it runs: every module's output, the gradients, the batches it trains on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.config import Config
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.trace import StageSummary, Summary, Trace, summarise
from diffbuf_lib.training.feed import Stream, seed_everything
from diffbuf_lib.training.signals import isolated

_NUMBERS = ("min", "max", "mean", "std", "zeros", "nan", "inf")


@dataclass
class ModuleWatch:
    """The outputs of a model's modules, in the order in which they finished."""

    visits: list[StageSummary] = field(default_factory=list)  # a row for every output tensor
    # Names of modules (their outputs) and parameters, with the number of elements of the gradient
    # that are NaN or Inf, from the loss backwards; only if asked for.
    gradients: list[tuple[str, int]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)  # how often each module ran
    # The first module that put out a NaN or an infinity (one finishes before the one that contains
    # it), and whether its inputs were finite: if not, the value came from outside of all modules.
    first_nonfinite: str | None = None
    inputs_were_finite: bool | None = None

    @property
    def outputs(self) -> Summary:
        """A row for every module that returned a tensor, from its last call."""
        return Summary(tuple({row.name: row for row in self.visits}.values()))


@contextmanager
def watch_modules(
    model: nn.Module,  # any; hooks are added to it and always removed again
    *,
    statistics: bool = True,  # a row for every output; else only its finiteness, which costs less
    gradients: bool = False,  # those of a backward pass within the block too
) -> Iterator[ModuleWatch]:
    """Watch all modules of a model while a block runs."""
    watch, handles = ModuleWatch(), []

    def note(name: str, gradient: Tensor) -> None:
        watch.gradients.append((name, int((~gradient.isfinite()).sum())))

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        watch.calls[name] += 1
        tensors = list(_tensors(output))
        for i, tensor in enumerate(tensors if statistics else ()):
            watch.visits += summarise({name if len(tensors) == 1 else f"{name}[{i}]": tensor})
        for tensor in tensors if gradients else ():
            if tensor.requires_grad:
                handles.append(tensor.register_hook(partial(note, name)))
        if watch.first_nonfinite is None and not all(map(_is_finite, tensors)):
            watch.first_nonfinite = name
            watch.inputs_were_finite = all(map(_is_finite, _tensors((args, kwargs))))

    try:
        for name, module in model.named_modules():
            hook = partial(see, name or type(model).__name__)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, parameter in model.named_parameters() if gradients else ():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(partial(note, name)))
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(value)


class RecordingModel(DiffusionBufferModel):
    """A model that reports the batches it trains on, before the backward pass of each.

    So a step that fails is reported, too. The weights are those that `train` would begin with.
    """

    def __init__(
        self,
        cfg: Config,
        say: Callable[[str], None],  # called with lines to print
        *,
        shapes: bool,  # whether to describe the first batch
        every: int,  # steps from one report of numbers to the next; 0 for none
        board: Path,  # folder for a TensorBoard run of its own, beside the run's
    ) -> None:
        with isolated(torch.device("cpu"), deterministic=False):
            seed_everything(cfg.training.seed, Stream.WEIGHTS)
            super().__init__(cfg)
        self.say, self.shapes, self.every, self.board = say, shapes, every, board
        self.last: Trace | None = None
        self._writer: Any = None

    def trace(self, *args: Any, **kwargs: Any) -> Trace:
        """As in `DiffusionBufferModel`."""
        trace = super().trace(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            if self.shapes and self.last is None:
                bins, frames = trace.Y.shape[-2:]
                sizes = f"buffer_size {trace.t.shape[-1]}, K {self.cfg.num_frames} online"
                head = f"first batch: {frames} frames of {bins} bins, {sizes}"
                note = "complex stages by their magnitudes, such as |score|"
                self.say(f"{head}; {note}\n{trace.summary()}")
            self.last = trace.detach()
        return trace

    def report(self, step: int) -> None:
        """Report the numbers of the last batch if `step`, from 1, is a multiple of `every`."""
        if not self.every or step % self.every or self.last is None:
            return
        summary = self.last.summary()
        self.say(f"step {step}\n{summary}")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            # If the run was resumed, points of later steps are dropped.
            self._writer = SummaryWriter(str(self.board), purge_step=step)
        for row, name in product(summary, _NUMBERS):
            if math.isfinite(getattr(row, name)):
                self._writer.add_scalar(f"stats/{row.name}/{name}", getattr(row, name), step)

    def close(self) -> None:
        """Close the board."""
        if self._writer is not None:
            self._writer.close()
