"""Watch every module's output while a model runs: a context manager that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.trace import Summary, summarise


class ModuleWatch:
    """What the modules of a model put out, in the order in which they finished.

    Attributes:
        first_nonfinite: name of the first module that put out a NaN or an infinity; a module
            finishes before the one that contains it. None if there was none.
        inputs_were_finite: whether that module's inputs were finite: then it, or its weights, made
            the bad value; if not, it came from outside of all modules.
        calls: how often each module ran.
    """

    def __init__(self) -> None:
        self.first_nonfinite: str | None = None
        self.inputs_were_finite: bool | None = None
        self.calls: dict[str, int] = {}
        self._summaries: dict[str, Summary] = {}

    @property
    def outputs(self) -> Summary:
        """A row for every module that put out a tensor; of its last call."""
        return Summary(tuple(row for summary in self._summaries.values() for row in summary))

    def _see(self, name: str, inputs: Any, output: Any, statistics: bool) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        tensors = list(_tensors(output))
        names = [name] if len(tensors) == 1 else [f"{name}[{i}]" for i in range(len(tensors))]
        if statistics and tensors:
            self._summaries.pop(name, None)  # to the end: the order of the last calls
            summary = summarise(dict(zip(names, tensors, strict=True)))
            self._summaries[name] = summary
            bad = summary.first_nonfinite is not None
        else:
            bad = not all(is_finite(tensor) for tensor in tensors)
        if bad and self.first_nonfinite is None:
            self.first_nonfinite = name
            self.inputs_were_finite = all(is_finite(tensor) for tensor in _tensors(inputs))


@contextmanager
def watch_modules(model: nn.Module, *, statistics: bool = True) -> Iterator[ModuleWatch]:
    """Watch all modules of a model while a block runs.

    Args:
        model: any module; hooks are put on it and taken off again, whatever happens.
        statistics: whether to summarise every output; else only its finiteness is looked at,
            which costs less.

    Yields:
        What was seen, filled as the model runs and still there after the block.
    """
    watch = ModuleWatch()

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            watch._see(name, (args, kwargs), output, statistics)

        return see

    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            label = name or type(model).__name__
            handles.append(module.register_forward_hook(hook(label), with_kwargs=True))
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
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)
