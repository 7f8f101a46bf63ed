"""What a model sounds like: held-out clips, and quality against delay."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data import ClipDataset, collate, find_layout, open_dataset, read_info
from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.evaluation import ScoredClip
from diffbuf_lib.figures import data_uri, player_gain, player_wav
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.streaming import OnlineEnhancer
from diffbuf_lib.trace import format_table
from diffbuf_lib.training import score_clips
from diffbuf_lib.training.metrics import check_metrics
from recipes.demo.means import summary
from walk import Workbench

_METRICS = ("si_sdr", "estoi", "pesq")
_LEAST_SECONDS = 0.5


class Players:
    """Signals to listen to side by side; Jupyter shows a row of players with captions.

    Args:
        waves: caption and signal [T], full scale 1. All are played at the same peak level; the
            caption says by how many dB that raised them.
        sample_rate: Hz.
    """

    def __init__(self, waves: Mapping[str, Tensor], sample_rate: int) -> None:
        self.waves, self.sample_rate = dict(waves), sample_rate

    def __repr__(self) -> str:
        return f"<players: {', '.join(self.waves)}>"

    def _repr_html_(self) -> str:
        rows = []
        for caption, wave in self.waves.items():
            gain = 20 * math.log10(player_gain(wave))
            source = data_uri(player_wav(wave, self.sample_rate), "audio/wav")
            rows.append(
                '<figure style="margin:0"><figcaption style="padding:0 0 .3em .5em">'
                f"{html.escape(caption)} <small>({gain:+.0f} dB)</small></figcaption>"
                f'<audio controls style="width:17em;max-width:100%" src="{source}"></audio>'
                "</figure>"
            )
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{"".join(rows)}</div>'


def held_out(bench: Workbench, cfg: Config, seconds: float = 3.0) -> ClipDataset:
    """Open clips that training has not seen, from `test/` or else the validation set.

    Each lasts `seconds`, or as long as the first file if that is shorter.
    """
    test = bench.data / "test"
    folder = test if find_layout(test) is not None else bench.valid_set.root
    layout = find_layout(folder)
    assert layout is not None, f"{folder} holds no clips"
    rate = cfg.audio.sample_rate
    dataset = open_dataset(layout, folder, cfg, training=False)
    longest = max(read_info(dataset.items[0][0]).frames, round(_LEAST_SECONDS * rate))
    samples = min(round(seconds * rate), longest)
    whole = cfg.model_copy(update={"audio": cfg.audio.model_copy(update={"chunk_size": samples})})
    return open_dataset(layout, folder, whole, training=False)


def usable_metrics(sample_rate: int) -> list[str]:
    """Return the metrics whose packages are installed and that are defined at a rate in Hz."""
    usable = []
    for name in _METRICS:
        with suppress(ConfigError, MissingExtraError):
            check_metrics([name], sample_rate)
            usable.append(name)
    return usable


def gain_table(clips: Sequence[ScoredClip], metrics: Sequence[str]) -> str:
    """Return the mean of each metric before and after, one line per metric."""
    rows = [["metric", "noisy", "enhanced", "gain", "clips"]]
    for row in summary(clips, metrics):
        means = [f"{row.noisy:.3f}", f"{row.enhanced:.3f}", f"{row.gain:+.3f}"]
        rows.append([row.metric, *means, f"{row.scored} of {row.clips}"])
    return format_table(rows)


def noise_floor(wave: Tensor, frame: int = 256) -> float:
    """Return the power that a tenth of a wave's [T] frames stay below: the level in pauses."""
    return float(wave.unfold(0, frame, frame).square().mean(dim=1).quantile(0.1))


def lag_samples(clips: Sequence[ScoredClip]) -> int:
    """Return by how many samples the estimates lag behind the mixtures.

    The peak of their cross-correlation, every frequency weighted equally (Knapp and Carter 1976,
    phase transform), so that neither a hum nor the level decides; the mean over clips.
    """
    total = torch.zeros(0)
    for clip in clips:
        mix, estimate = clip.mix.double(), clip.estimate.double()
        size = 2 * len(mix)
        cross = torch.fft.rfft(estimate, size) * torch.fft.rfft(mix, size).conj()
        correlation = torch.fft.irfft(cross / cross.abs().clamp_min(1e-12), size)
        total = correlation if not len(total) else total + correlation
    lag = int(total.argmax())
    return lag if lag < len(total) // 2 else lag - len(total)


def measured_latency(enhancer: OnlineEnhancer, limit: int = 100_000) -> int:
    """Push silence sample by sample; return how many went in when the first came out."""
    enhancer.reset()
    sample = torch.zeros(1)
    pushed = next((n for n in range(1, limit) if len(enhancer.push(sample))), limit)
    enhancer.reset()
    return pushed


class DelayScore(NamedTuple):
    """How well a model does with one buffer and one output delay."""

    buffer_size: int  # B, frames
    delay: int  # d, frames, 1 to B
    latency_ms: float  # samples to be pushed before the first comes out, as ms
    gains: dict[str, Tensor]  # [n] of each metric: enhanced minus noisy; NaN where not defined

    def mean(self, metric: str) -> float:
        """Return the mean gain over the clips for which it is defined."""
        return float(self.gains[metric].nanmean())


def delay_scores(
    model: DiffusionBufferModel,
    dataset: ClipDataset,
    settings: Sequence[tuple[int, int]],
    metrics: Sequence[str],
    *,
    clips: int = 3,
) -> list[DelayScore]:
    """Enhance the same clips, as streams side by side, with several (B, d) pairs.

    The model's weights serve every buffer size; it was trained with one of them.
    """
    rate = model.cfg.audio.sample_rate
    pairs = [dataset[i] for i in range(min(clips, len(dataset)))]
    mix, target = collate([(m.mean(0, keepdim=True), s.mean(0, keepdim=True)) for m, s in pairs])
    mix, target = mix[:, 0], target[:, 0]  # [n, T]
    noisy = score_clips(mix, target, rate, metrics)
    rows = []
    for B, d in settings:
        enhancer = OnlineEnhancer(with_buffer(model, B), seed=0, delay=d, batch=len(mix))
        out = torch.cat([enhancer.push(mix), enhancer.flush().reshape(len(mix), -1)], dim=-1)
        scores = score_clips(out, target, rate, metrics)
        gains = {name: scores[name] - noisy[name] for name in metrics}
        rows.append(DelayScore(B, d, 1000 * enhancer.latency_samples / rate, gains))
    return rows


def delay_settings(model: DiffusionBufferModel) -> list[tuple[int, int]]:
    """Choose (B, d) pairs: the model's own buffer read earlier, shorter ones read at their end."""
    B = model.cfg.diffusion_buffer.buffer_size
    # A single frame has no schedule: its only time would be t_eps, where there is no noise.
    sizes = sorted({max(2, round(B * i / 3)) for i in (1, 2)} | {B})
    delays = sorted({1, *(size for size in sizes if size <= B)}) if model.predicts_data else [B]
    return [(B, d) for d in delays] + [(size, size) for size in sizes if size < B]


def with_buffer(model: DiffusionBufferModel, buffer_size: int) -> DiffusionBufferModel:
    """Return the model with another buffer size: the same weights, in evaluation mode."""
    cfg = model.cfg.override(f"diffusion_buffer.buffer_size={buffer_size}")
    other = DiffusionBufferModel(cfg).to(next(model.parameters()).device)
    other.load_state_dict(model.state_dict())
    return other.eval()
