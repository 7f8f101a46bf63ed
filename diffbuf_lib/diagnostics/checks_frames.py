"""The doctor's look at the numbers of a config: frames, buffer, latency, noise schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from diffbuf_lib.config import Config, SDEConfig
from diffbuf_lib.diagnostics.findings import Finding
from diffbuf_lib.diffusion.sde import make_sde

AUTHORS_SIGMA = 0.212  # the largest sigma of the authors' code, theta 0.08, k 2.6, t up to 1
FP16_MAX = 65504.0
_FLOAT32_MAX = 3.4e38
_FAR = 3.0  # times larger or smaller than the authors': the confusion of c and theta is 3.5
_AUTHORS = ("sde.type=bbed", "sde.diffusion={theta: 0.08, k: 2.6}")
_TIMES = 1001


def check_frames(cfg: Config) -> Iterator[Finding]:
    """Count frames, exactly, and say what the buffer costs in time."""
    stft, chunk = cfg.audio.stft, cfg.audio.chunk_size
    frames, Kb, K = cfg.audio.num_frames, cfg.diffusion_buffer.buffer_size, cfg.num_frames
    formula = "1 + T // hop" if stft.center else "1 + (T - n_fft) // hop"
    seconds = chunk / cfg.audio.sample_rate
    yield Finding(
        "ok",
        "frames.count",
        f"{chunk} samples ({seconds:.3g} s) are {frames} STFT frames of {stft.n_fft // 2 + 1} bins "
        f"({'centred' if stft.center else 'not centred'}: {formula})",
        value=frames,
        config_key="audio.chunk_size",
    )
    yield from _window(cfg, frames, K)
    share = Kb / frames
    if share > 0.5:
        yield Finding(
            "warning",
            "frames.buffer",
            f"the buffer takes {Kb} of the {frames} frames of a clip",
            value=Kb,
            limit=frames // 2,
            why="most of what the network sees is noise; little clean past is left to go by",
            fix=f"lower diffusion_buffer.buffer_size to {max(1, frames // 2)} or raise "
            "audio.chunk_size",
            config_key="diffusion_buffer.buffer_size",
            overrides=(f"diffusion_buffer.buffer_size={max(1, frames // 2)}",),
        )
    else:
        yield Finding(
            "ok",
            "frames.buffer",
            f"the buffer takes {Kb} of the {frames} frames of a clip",
            value=Kb,
            limit=frames,
            config_key="diffusion_buffer.buffer_size",
        )
    hop_ms = 1000 * stft.hop_length / cfg.audio.sample_rate
    window_ms = 1000 * stft.n_fft / cfg.audio.sample_rate
    buffer_ms = (Kb - 1) * hop_ms
    yield Finding(
        "info",
        "frames.latency",
        f"latency online: {buffer_ms:.0f} ms of buffer ({Kb - 1} hops of {hop_ms:.3g} ms) and "
        f"{window_ms:.0f} ms of STFT window",
        value=buffer_ms + window_ms,
        config_key="diffusion_buffer.buffer_size",
    )


def check_schedule(cfg: Config) -> Iterator[Finding]:
    """Follow sigma over the diffusion times of the buffer."""
    buffer, sde = cfg.diffusion_buffer, make_sde(cfg.sde)
    t = torch.linspace(buffer.t_eps, buffer.t_max, _TIMES, dtype=torch.float64)
    sigma = sde.std(t)
    low, high = float(sigma.min()), float(sigma.max())
    yield Finding(
        "ok",
        "schedule.sigma",
        f"sigma goes from {low:.4g} to {high:.4g} over t in [{buffer.t_eps}, {buffer.t_max}]",
        value=[low, high],
        config_key="sde.diffusion",
    )
    yield from _score_targets(cfg, low)
    if cfg.sde.type == "bbed":
        yield from _c_or_theta(cfg.sde)
    if buffer.t_max < 0.3 or buffer.t_eps > 0.2:
        yield Finding(
            "warning",
            "schedule.times",
            f"the buffer's times are [{buffer.t_eps}, {buffer.t_max}]",
            value=[buffer.t_eps, buffer.t_max],
            limit=[0.2, 0.3],
            why="online, a new frame enters at t_max and leaves after t_eps: the model is then "
            "trained on little of the way from noisy to clean",
            fix="take t_eps near 0.03 and t_max near 0.8",
            config_key="diffusion_buffer.t_eps",
            overrides=("diffusion_buffer.t_eps=0.03", "diffusion_buffer.t_max=0.8"),
        )


def _window(cfg: Config, frames: int, K: int) -> Iterator[Finding]:
    """Compare K, what the network sees online, with the frames of a training clip."""
    if frames >= K:
        yield Finding(
            "ok",
            "frames.window",
            f"online the network sees K = {K} frames, no more than in training ({frames})",
            value=K,
            limit=frames,
            config_key="diffusion_buffer.num_frames",
        )
        return
    stft = cfg.audio.stft
    needed = (K - 1) * stft.hop_length + (0 if stft.center else stft.n_fft)
    seconds = needed / cfg.audio.sample_rate
    yield Finding(
        "warning",
        "frames.window",
        f"K = {K} frames are {needed} samples ({seconds:.2f} s), and a clip of "
        f"{cfg.audio.chunk_size} has {frames}",
        value=K,
        limit=frames,
        why="online the network would see a longer past than it ever saw in training",
        fix=f"raise audio.chunk_size to {needed}, or lower diffusion_buffer.num_frames to {frames}",
        config_key="diffusion_buffer.num_frames",
        overrides=(f"diffusion_buffer.num_frames={frames}",),
    )


def _score_targets(cfg: Config, low: float) -> Iterator[Finding]:
    """Compare the largest score target, 1 / sigma, with what number formats can hold."""
    largest = 1 / low if low > 0 else math.inf
    training, name = cfg.training, "schedule.score_target"
    message = f"score targets reach 1 / sigma = {largest:.4g} at t_eps"
    fixes = {
        "config_key": "diffusion_buffer.t_eps",
        "overrides": ("diffusion_buffer.t_eps=0.03",),
    }
    in_fp16 = training.use_amp and training.amp_dtype == "fp16"
    power = 2 if training.loss == "score" else 1
    if not largest < _FLOAT32_MAX ** (1 / power):
        yield Finding(
            "error",
            name,
            f"{message}, too large for {'its square in ' if power == 2 else ''}float32",
            value=largest,
            limit=_FLOAT32_MAX ** (1 / power),
            why="loss or score are infinite from the first step on",
            fix="raise sde.diffusion's c, theta or sigma_min, or diffusion_buffer.t_eps",
            config_key="sde.diffusion",
            overrides=_AUTHORS,
        )
    elif largest > FP16_MAX and in_fp16 and cfg.model.output_scale != "sigma":
        yield Finding(
            "error",
            name,
            f"{message}, above float16's largest number 65504",
            value=largest,
            limit=FP16_MAX,
            why="with model.output_scale other than sigma the network itself has to put it out, "
            "and overflows under mixed precision",
            fix="raise diffusion_buffer.t_eps to 0.03, or set model.output_scale=sigma",
            **fixes,  # type: ignore[arg-type]
        )
    elif largest > FP16_MAX / 64:
        yield Finding(
            "warning",
            name,
            f"{message}, near or above float16's largest number 65504",
            value=largest,
            limit=FP16_MAX / 64,
            why="the loss `score` is made up of the few frames with the smallest sigma, and "
            "gradients overflow float16",
            fix="raise diffusion_buffer.t_eps to 0.03, or take training.loss=weighted_score",
            **fixes,  # type: ignore[arg-type]
        )
    else:
        yield Finding(
            "ok",
            name,
            f"{message}; float16 ends at 65504",
            value=largest,
            limit=FP16_MAX,
            config_key="diffusion_buffer.t_eps",
        )


def _c_or_theta(cfg: SDEConfig) -> Iterator[Finding]:
    """Compare sigma's maximum over the whole bridge with that of the authors' code.

    The paper prints c = 0.08, its authors' code runs theta = c^2 = 0.08: 3.5 times the noise.
    """
    t = torch.linspace(0, 1, _TIMES, dtype=torch.float64)[1:-1]
    high = float(make_sde(cfg).std(t).max())
    times = high / AUTHORS_SIGMA
    spelling = "c" if cfg.diffusion.c is not None else "theta"
    if 1 / _FAR <= times <= _FAR:
        yield Finding(
            "ok",
            "schedule.c_theta",
            f"sigma's maximum {high:.3f} is near the authors' {AUTHORS_SIGMA}",
            value=high,
            limit=AUTHORS_SIGMA,
            config_key=f"sde.diffusion.{spelling}",
        )
        return
    yield Finding(
        "warning",
        "schedule.c_theta",
        f"sigma's maximum is {high:.3f}, {times:.2g} times the authors' {AUTHORS_SIGMA}",
        value=high,
        limit=AUTHORS_SIGMA,
        why="the paper prints c = 0.08 where its authors' code runs theta = 0.08, c = "
        "sqrt(theta) = 0.283; with the wrong one the network meets another noise than the paper's",
        fix="set sde.diffusion to {theta: 0.08, k: 2.6}, unless this is the experiment",
        config_key=f"sde.diffusion.{spelling}",
        overrides=_AUTHORS,
    )
