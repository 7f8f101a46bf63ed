"""Which modules learn: the gradients that a backward pass left, module by module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.trace import format_table


@dataclass(frozen=True)
class GradientRow:
    """Gradients of one module's own parameters, without those of the modules inside it.

    Attributes:
        module: its name.
        parameters: how many numbers have a gradient.
        missing: how many have none: the loss does not depend on them, or nothing was computed.
        norm: of the gradient.
        max: its largest magnitude.
        zeros: share of zeros, 0 to 1.
        nonfinite: elements that are NaN or Inf.
        weight_norm: of the parameters.
    """

    module: str
    parameters: int
    missing: int
    norm: float
    max: float
    zeros: float
    nonfinite: int
    weight_norm: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; what JSON cannot hold becomes None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class GradientStatistics:
    """A row for every module that owns parameters; prints as a table."""

    rows: tuple[GradientRow, ...]

    def __iter__(self) -> Iterator[GradientRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, module: str) -> GradientRow:
        for row in self.rows:
            if row.module == module:
                return row
        raise KeyError(module)

    @property
    def norm(self) -> float:
        """Norm of all gradients together."""
        return math.sqrt(sum(row.norm**2 for row in self.rows))

    def __str__(self) -> str:
        head = ["module", "parameters", "missing", "norm", "max", "zeros", "not finite", "weights"]
        body = [
            [
                row.module,
                str(row.parameters),
                str(row.missing),
                f"{row.norm:.3g}",
                f"{row.max:.3g}",
                f"{row.zeros:.1%}",
                str(row.nonfinite),
                f"{row.weight_norm:.3g}",
            ]
            for row in self.rows
        ]
        return format_table([head, *body])


def gradient_statistics(model: nn.Module) -> GradientStatistics:
    """Measure the gradients that the last backward pass left, module by module.

    Args:
        model: any module; call this after `backward` and before `zero_grad`.
    """
    counts: list[tuple[str, int, int]] = []
    numbers: list[Tensor] = []  # [4] each: squared norm, max, zeros, squared weights
    with torch.no_grad():
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if not own:
                continue
            gradients = [p.grad for p in own if p.grad is not None]
            present = sum(g.numel() for g in gradients)
            counts.append((name, present, sum(p.numel() for p in own) - present))
            numbers.append(_gradient_numbers(own, gradients))
        table = torch.stack(numbers).tolist() if numbers else []
    rows = []
    for (name, present, missing), values in zip(counts, table, strict=True):
        squared, largest, zeros, weights = values
        nonfinite = 0 if math.isfinite(largest) else _nonfinite(model.get_submodule(name))
        rows.append(
            GradientRow(
                module=name or type(model).__name__,
                parameters=present,
                missing=missing,
                norm=math.sqrt(squared),
                max=largest,
                zeros=zeros / present if present else 0.0,
                nonfinite=nonfinite,
                weight_norm=math.sqrt(weights),
            )
        )
    return GradientStatistics(tuple(rows))


def _nonfinite(module: nn.Module) -> int:
    """Count the elements of the module's own gradients that are NaN or Inf: slow, and rare."""
    gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
    return int(sum((~g.isfinite()).sum() for g in gradients))


def _gradient_numbers(parameters: list[nn.Parameter], gradients: list[Tensor]) -> Tensor:
    weights = torch.stack([p.float().norm() for p in parameters]).square().sum()
    if not gradients:
        return torch.stack([*weights.new_zeros(3), weights])
    flat = [g.float() for g in gradients]
    return torch.stack(
        [
            torch.stack([g.norm() for g in flat]).square().sum(),
            torch.stack([torch.maximum(g.amax(), -g.amin()) for g in flat]).max(),
            sum((g.numel() - torch.count_nonzero(g) for g in flat), weights.new_zeros(())),
            weights,
        ]
    )
