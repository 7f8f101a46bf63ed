"""Enhance the clips of a dataset and score them beside the noisy input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffbuf_lib.data import ClipDataset, collate
from diffbuf_lib.evaluation.clips import clip_generators
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training.metrics import check_metrics, mean_scores, score_clips


@dataclass(frozen=True)
class ScoredClip:
    """One enhanced clip.

    Attributes:
        name: its files.
        mix: [T], the noisy signal, averaged to mono.
        target: [T], the clean signal.
        estimate: [T], the enhanced signal.
        noisy: every metric of mix; NaN where it is not defined.
        enhanced: every metric of estimate.
    """

    name: str
    mix: Tensor
    target: Tensor
    estimate: Tensor
    noisy: dict[str, float]
    enhanced: dict[str, float]


def evaluate(
    model: DiffusionBufferModel,
    dataset: ClipDataset,
    metrics: Sequence[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    limit: int | None = None,
) -> Iterator[ScoredClip]:
    """Enhance and score clip after clip, in batches.

    Every clip has a generator of its own, seeded by (seed, clip), so its estimate does not depend
    on the batch size.

    Args:
        model: any DiffusionBufferModel, on any device.
        dataset: clips; opened with training=False.
        metrics: names that `score_clips` knows.
        batch_size: clips enhanced at a time.
        seed: of the diffusion noise.
        limit: only the first clips.

    Raises:
        DataError: a clip that cannot be read.
        ConfigError, MissingExtraError: a metric that cannot be had.
    """
    rate = model.cfg.audio.sample_rate
    check_metrics(metrics, rate)
    device = next(model.parameters()).device
    indices = range(min(len(dataset), limit or len(dataset)))
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        mix, target = collate([dataset[i] for i in batch])
        generators = clip_generators(batch, seed, device)
        estimate = model.enhance(mix.to(device), generators).mean(1).cpu()
        mix, target = mix.mean(1), target.mean(1)
        noisy = score_clips(mix, target, rate, metrics)
        enhanced = score_clips(estimate, target, rate, metrics)
        for j, i in enumerate(batch):
            yield ScoredClip(
                name=dataset.name(i),
                mix=mix[j],
                target=target[j],
                estimate=estimate[j],
                noisy={metric: float(values[j]) for metric, values in noisy.items()},
                enhanced={metric: float(values[j]) for metric, values in enhanced.items()},
            )


@dataclass(frozen=True)
class MeanGain:
    """A metric's means over the clips for which it is defined before and after.

    Attributes:
        metric: its name.
        noisy: mean of the mixtures.
        enhanced: mean of the estimates.
        scored: clips that the means are over.
        clips: clips that there were.
    """

    metric: str
    noisy: float
    enhanced: float
    scored: int
    clips: int

    @property
    def gain(self) -> float:
        """Enhanced minus noisy, in the metric's unit."""
        return self.enhanced - self.noisy


def summary(clips: Sequence[ScoredClip], metrics: Sequence[str]) -> list[MeanGain]:
    """Average over clips, a row a metric; a clip without a score on either side is left out."""
    rows = []
    for metric in metrics:
        pairs = torch.tensor([[clip.noisy[metric], clip.enhanced[metric]] for clip in clips])
        pairs = pairs.reshape(-1, 2)
        pairs[pairs.isnan().any(dim=1)] = torch.nan
        means = mean_scores({"noisy": pairs[:, 0], "enhanced": pairs[:, 1]})
        noisy, enhanced = means["noisy"], means["enhanced"]
        rows.append(MeanGain(metric, noisy.mean, enhanced.mean, noisy.scored, len(clips)))
    return rows
