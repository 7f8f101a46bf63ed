"""Where a model is wrong: by diffusion time and by frequency.

A loss is one number; these tell which times and bands it is made of, and whether the score has the
right size and direction there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from diffbuf_lib.model import DiffusionBufferModel, evaluating
from diffbuf_lib.trace import Trace, format_table


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
    """Sums over a grid of times and bands, from which every mean follows.

    Attributes:
        times: [N + 1] edges of the bins of diffusion time.
        bands: [M + 1] edges of the frequency bands, Hz.
        sums: [5, N, M] float64: count, |target|^2, |score|^2, Re(score conj target), loss.
    """

    times: tuple[float, ...]
    bands: tuple[float, ...]
    sums: Tensor

    @property
    def by_time(self) -> list[ScoreRow]:
        """A row for every bin of diffusion time."""
        return _rows(self.times, self.sums.sum(dim=2))

    @property
    def by_band(self) -> list[ScoreRow]:
        """A row for every frequency band."""
        return _rows(self.bands, self.sums.sum(dim=1))

    @property
    def grid(self) -> list[list[ScoreRow]]:
        """A list for every bin of time with a row for every band (low and high are Hz)."""
        return [_rows(self.bands, self.sums[:, i]) for i in range(self.sums.shape[1])]

    def __str__(self) -> str:
        tables = []
        for name, digits, rows in (("t", 3, self.by_time), ("Hz", 0, self.by_band)):
            table = [[name, "count", "target RMS", "score RMS", "loss", "correlation"]]
            for row in rows:
                span = f"{row.low:.{digits}f}-{row.high:.{digits}f}"
                means = [f"{mean:.4g}" for mean in (row.target_rms, row.score_rms, row.loss)]
                table.append([span, str(row.count), *means, f"{row.correlation:.3f}"])
            tables.append(format_table(table))
        return "\n\n".join(tables)


def score_statistics(
    model: DiffusionBufferModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    time_bins: int = 8,
    bands: int = 8,
    batches: int | None = None,
    seed: int = 0,
) -> ScoreStatistics:
    """Compare predicted and target score over diffusion times and frequencies.

    The model is evaluated without dropout and left in the mode it was in; times and noise have a
    generator of their own, so the same call gives the same numbers.

    Args:
        model: the model.
        loader: batches (mix, target), each [B, C, T] float32, full scale 1.
        time_bins: equal ranges of [t_eps, t_max].
        bands: ranges of frequency, of equally many bins or nearly so.
        batches: at most so many; None for all.
        seed: of diffusion times and noise.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    buffer, audio = model.cfg.diffusion_buffer, model.cfg.audio
    num_bins = audio.stft.n_fft // 2 + 1
    bands = min(bands, num_bins)
    edges = torch.linspace(buffer.t_eps, buffer.t_max, time_bins + 1, device=device)
    band = torch.arange(num_bins, device=device) * bands // num_bins  # [F]
    sums = torch.zeros(5, time_bins, bands, dtype=torch.float64)
    with torch.no_grad(), evaluating(model):
        for mix, target in islice(loader, batches):
            trace = model.trace(mix.to(device), target.to(device), generator)
            sums += _sums(trace, edges, band, time_bins, bands).cpu()
    first = [int((band < i).sum()) for i in range(bands + 1)]
    hertz = [min(i * audio.sample_rate / audio.stft.n_fft, audio.sample_rate / 2) for i in first]
    return ScoreStatistics(tuple(edges.tolist()), tuple(hertz), sums)


def _sums(trace: Trace, edges: Tensor, band: Tensor, time_bins: int, bands: int) -> Tensor:
    """Return [5, N, M]: every coefficient's numbers added to its time's and its band's."""
    score, target, loss = trace.score, trace.target_score, trace.loss_map  # [B, F, Kb]
    product = (score * target.conj()).real
    values = [torch.ones_like(loss), target.abs().square(), score.abs().square(), product, loss]
    when = torch.bucketize(trace.t, edges[1:-1].contiguous(), right=True)  # [B, Kb]
    cell = when.unsqueeze(1) * bands + band[:, None]  # [B, F, Kb]
    sums = edges.new_zeros(5, time_bins * bands, dtype=torch.float64)
    sums.index_add_(1, cell.flatten(), torch.stack(values).double().flatten(1))
    return sums.view(5, time_bins, bands)


def _rows(edges: tuple[float, ...], sums: Tensor) -> list[ScoreRow]:
    rows = []
    for i, (count, target, score, product, loss) in enumerate(sums.T.tolist()):
        means = [total / count if count else math.nan for total in (target, score, loss)]
        target_rms, score_rms = (math.sqrt(mean) for mean in means[:2])
        size = math.sqrt(target * score)
        rows.append(
            ScoreRow(
                low=edges[i],
                high=edges[i + 1],
                count=int(count),
                target_rms=target_rms,
                score_rms=score_rms,
                loss=means[2],
                correlation=product / size if size else math.nan,
            )
        )
    return rows
