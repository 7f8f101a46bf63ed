"""Where a model is wrong, by diffusion time and frequency, and where its gradients are large."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.model import DiffusionBufferModel, evaluating
from diffbuf_lib.trace import format_table


@dataclass(frozen=True)
class ScoreRow:
    """Score and target over one range of diffusion times or frequencies."""

    low: float  # of the range: a time, or Hz
    high: float
    count: int  # complex coefficients that fell into it
    target_rms: float  # root mean square of |target score|
    score_rms: float  # of |predicted score|
    loss: float  # mean of the loss map
    correlation: float  # Re <score, target> / (|score| |target|), -1 to 1; NaN where one is zero


@dataclass(frozen=True)
class ScoreStatistics:
    """Rows for N ranges of diffusion time and M frequency bands; prints as two tables."""

    times: list[float]  # N + 1 edges
    bands: list[float]  # M + 1 edges, Hz
    by_time: list[ScoreRow]
    by_band: list[ScoreRow]
    grid: list[list[ScoreRow]]  # for every time range, a row per band (low and high in Hz)

    def __str__(self) -> str:
        return f"{_table(ScoreRow, self.by_time)}\n\n{_table(ScoreRow, self.by_band)}"


def score_statistics(
    model: DiffusionBufferModel,
    loader: Iterable[tuple[Tensor, Tensor]],  # (mix, target), each [B, C, T] float32, full scale 1
    *,
    time_bins: int = 8,  # equal ranges of [t_eps, t_max]
    bands: int = 8,  # ranges of frequency, with (nearly) equal numbers of bins
    batches: int | None = None,  # at most this many; None for all
    seed: int = 0,  # of diffusion times and noise
) -> ScoreStatistics:
    """Compare predicted and target score over diffusion times and frequencies.

    The model is evaluated without dropout and left in the mode it was in; times and noise have a
    generator of their own, so the same call gives the same numbers.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    buffer, audio = model.cfg.diffusion_buffer, model.cfg.audio
    num_bins = audio.stft.n_fft // 2 + 1
    bands = min(bands, num_bins)
    edges = torch.linspace(buffer.t_eps, buffer.t_max, time_bins + 1, device=device)
    band = torch.arange(num_bins, device=device) * bands // num_bins  # [F]
    flat_sums = torch.zeros(5, time_bins * bands, dtype=torch.float64, device=device)
    with torch.no_grad(), evaluating(model):
        for mix, target in islice(loader, batches):
            trace = model.trace(mix.to(device), target.to(device), generator)
            score, wanted, loss = trace.score, trace.target_score, trace.loss_map  # [B, F, Kb]
            products = [wanted.abs().square(), score.abs().square(), (score * wanted.conj()).real]
            values = torch.stack([torch.ones_like(loss), *products, loss]).double()
            when = torch.bucketize(trace.t, edges[1:-1].contiguous(), right=True)  # [B, Kb]
            cell = when.unsqueeze(1) * bands + band[:, None]  # [B, F, Kb]
            flat_sums.index_add_(1, cell.flatten(), values.flatten(1))
    first = [int((band < i).sum()) for i in range(bands + 1)]
    hertz = [min(i * audio.sample_rate / audio.stft.n_fft, audio.sample_rate / 2) for i in first]
    times, sums = edges.tolist(), flat_sums.view(5, time_bins, bands).cpu()
    by_time, by_band = _score_rows(times, sums.sum(dim=2)), _score_rows(hertz, sums.sum(dim=1))
    grid = [_score_rows(hertz, each) for each in sums.unbind(1)]
    return ScoreStatistics(times, hertz, by_time, by_band, grid)


def _score_rows(edges: Sequence[float], sums: Tensor) -> list[ScoreRow]:
    """Make a row from each column of [5, N]: count, |target|^2, |score|^2, their product, loss."""
    rows = []
    for span, column in zip(pairwise(edges), sums.T.tolist(), strict=True):
        number, target, score, product, loss = column
        count, size = number or math.nan, math.sqrt(target * score) or math.nan
        rms = math.sqrt(target / count), math.sqrt(score / count)
        rows.append(ScoreRow(*span, int(number), *rms, loss / count, product / size))
    return rows


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


class GradientStatistics(list[GradientRow]):
    """A row for every module that owns parameters; prints as a table."""

    @property
    def norm(self) -> float:
        """Norm of all gradients together."""
        return math.hypot(*(row.norm for row in self))

    def __str__(self) -> str:
        return _table(GradientRow, self)


@torch.no_grad()
def gradient_statistics(model: nn.Module) -> GradientStatistics:
    """Measure the gradients of the last `backward` per module; call it before `zero_grad`."""
    rows, empty = GradientStatistics(), torch.zeros(0)
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        flat = torch.cat([p.grad.float().flatten() for p in own if p.grad is not None] or [empty])
        row = GradientRow(
            module=name or type(model).__name__,
            parameters=flat.numel(),
            missing=sum(p.numel() for p in own) - flat.numel(),
            norm=float(flat.norm()),
            max=float(flat.norm(torch.inf)) if flat.numel() else 0.0,
            zeros=int((flat == 0).sum()) / max(1, flat.numel()),
            nonfinite=int((~flat.isfinite()).sum()),
            weight_norm=float(nn.utils.get_total_norm(own)),
        )
        rows.append(row)
    return rows


def _table(kind: Any, rows: Iterable[Any]) -> str:
    cells = (
        [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in astuple(row)]
        for row in rows
    )
    return format_table([[field.name for field in fields(kind)], *cells])
