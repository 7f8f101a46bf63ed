"""What `DiffusionBufferModel.trace` returns: every stage of one training batch, by name.

And how stages are described: `summarise` gives a row of numbers for each named tensor,
`format_table` prints rows, `to_plain` makes values ready for JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from pydantic_core import to_jsonable_python
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """All random numbers of one training batch: the same draws give the same loss.

    The last two are for training.own_estimate.
    """

    t: Tensor  # [B, Kb], diffusion times, rising
    z: Tensor  # [B, F, Kb] complex, the noise, CN(0, 1)
    first_z: Tensor | None = None  # [B, F, K] complex, the noise of the first call
    own: Tensor | None = None  # [B] bool, the clips whose V is made from the network's own estimate

    def to(self, device: torch.device | str) -> Draws:
        """Return a copy on another device."""
        return Draws(**{name: value.to(device) for name, value in self.to_dict().items()})

    def to_dict(self) -> dict[str, Tensor]:
        """Return the fields that are set, by name: `Draws(**d)` is the inverse."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Trace:
    """Every stage of one training batch; B examples, F bins, K frames, Kb of them in the buffer.

    `trace(mix, target, draws=trace.draws)` gives the same trace again.
    """

    mix: Tensor  # [B, C, T], the noisy signal as it was given
    target: Tensor  # [B, C, T], the clean signal as it was given
    Y: Tensor  # [B, F, K] complex, compressed spectrum of the noisy signal
    S: Tensor  # [B, F, K] complex, compressed spectrum of the clean signal
    t: Tensor  # [B, Kb], diffusion times, rising
    sigma: Tensor  # [B, Kb], standard deviation of the noise at t
    z: Tensor  # [B, F, Kb] complex, the noise, CN(0, 1)
    V: Tensor  # [B, F, K] complex, the perturbed input
    score: Tensor  # [B, F, Kb] complex, the network's estimate of grad log p
    x0_hat: Tensor  # [B, F, Kb] complex, its estimate of S in the buffer
    target_score: Tensor  # [B, F, Kb] complex, -z / sigma
    loss_map: Tensor  # [B, F, Kb], per bin; for data prediction over model.data_scale^2, if set
    loss: Tensor  # scalar, the mean of loss_map; own_estimate averages it with the first call's
    draws: Draws  # all random numbers
    level: Tensor | None = None  # [B, K], what Y and S were divided by, RMS in full scale, if any

    def stages(self) -> dict[str, Tensor]:
        """Return every stage by name, in the order in which they are made."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def detach(self) -> Self:
        """Return a copy without gradients."""
        stages: dict[str, Any] = {name: stage.detach() for name, stage in self.stages().items()}
        return replace(self, **stages)

    def summary(self) -> Summary:
        """Return shape, type, range, zeros, NaN and Inf of every stage; prints as a table."""
        return summarise(self.stages())


@dataclass(frozen=True)
class StageSummary:
    """Statistics of one tensor; for a complex tensor, of its magnitudes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # without "torch."
    device: str
    min: float  # over finite values, like max, mean and std; NaN if there are none
    max: float
    mean: float
    std: float  # of the population: over n, not n - 1
    zeros: float  # share of elements that are zero, 0 to 1
    nan: int  # elements that are NaN (complex: in either part)
    inf: int  # other elements that are infinite

    @property
    def finite(self) -> bool:
        """Whether every element is a finite number."""
        return self.nan == 0 and self.inf == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON-serialisable values (`to_plain`)."""
        return dict(to_plain(self))


@dataclass(frozen=True)
class Summary:
    """One row per tensor; prints as a table, and `summary["V"]` is the row of that name."""

    rows: tuple[StageSummary, ...]

    def __iter__(self) -> Iterator[StageSummary]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> StageSummary:
        return {row.name: row for row in self.rows}[name]

    @property
    def first_nonfinite(self) -> str | None:
        """Name of the first row that holds a NaN or an infinity; None if none does."""
        return next((row.name for row in self.rows if not row.finite), None)

    def __str__(self) -> str:
        numbers = ("min", "max", "mean", "std", "zeros", "NaN", "Inf")
        table = [["stage", "shape", "dtype", "device", *numbers]]
        for row in self.rows:
            values = [f"{value:.3g}" for value in (row.min, row.max, row.mean, row.std)]
            shape = "x".join(map(str, row.shape)) or "scalar"
            counts = [f"{row.zeros:.1%}", str(row.nan), str(row.inf)]
            table.append([row.name, shape, row.dtype, row.device, *values, *counts])
        return format_table(table, left=4)


def summarise(tensors: Mapping[str, Tensor]) -> Summary:
    """Summarise named tensors of any shape, type and device; they are neither kept nor changed."""
    return Summary(tuple(_row(name, tensor.detach()) for name, tensor in tensors.items()))


def format_table(table: list[list[str]], left: int = 1) -> str:
    """Align the columns of a table of strings; the first `left` columns to the left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def to_plain(value: Any) -> Any:
    """Return a JSON-serialisable value: NaN and infinities become None, paths become strings."""

    def others(other: Any) -> Any:  # tensors, numpy's arrays and scalars
        return other.tolist() if hasattr(other, "tolist") else str(other)

    return to_jsonable_python(value, inf_nan_mode="null", fallback=others)


def _row(name: str, tensor: Tensor) -> StageSummary:
    values = tensor.abs() if tensor.is_complex() else tensor
    if values.dtype not in (torch.float32, torch.float64):  # in a type that can hold the sums
        values = values.float() if values.is_floating_point() else values.double()
    low, high, mean, std, nonzero = _numbers(values).tolist()
    nan = inf = 0
    if tensor.numel() and not math.isfinite(low + high + std):
        nan, finite = int(tensor.isnan().sum()), values.isfinite()
        inf = tensor.numel() - int(finite.sum()) - nan
        low, high, mean, std, _ = _numbers(values[finite].double()).tolist()  # squares overflow
        nonzero = int(torch.count_nonzero(values))  # NaN and Inf are not zero either
    zeros = 1 - nonzero / tensor.numel() if tensor.numel() else 0.0
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    numbers = (low, high, mean, std, zeros, nan, inf)
    return StageSummary(name, shape, dtype, str(tensor.device), *numbers)


def _numbers(values: Tensor) -> Tensor:
    """Return min, max, mean, std and the number of nonzero elements, [5].

    Min and max propagate NaN and infinities, so finite tensors need no extra pass to find them. On
    a CPU, these five passes take a tenth of the time of torch.var_mean and torch.aminmax.
    """
    if not values.numel():
        return values.new_tensor([math.nan] * 4 + [0.0])
    mean = values.mean()
    std = torch.linalg.vector_norm(values - mean) / math.sqrt(values.numel())
    nonzero = torch.count_nonzero(values).to(values.dtype)
    return torch.stack([values.amin(), values.amax(), mean, std, nonzero])
