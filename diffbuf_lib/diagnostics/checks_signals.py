"""The doctor's look at the signals of a dataset: silence, clipping, mixtures, SNR, level."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from diffbuf_lib.config import Config
from diffbuf_lib.data.audit import ClipFacts, WaveFacts
from diffbuf_lib.data.datasets import MixingDataset
from diffbuf_lib.diagnostics.findings import Finding
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.diffusion.spectral import Spectral

_NAMED = 3  # clips that a message names before it only counts
_CLIPPED, _DC = 1e-3, 0.1  # shares: of a file's samples, of its RMS
_RESIDUAL_DB = -20.0  # 16-bit rounding of three files stays far below
_LEVEL = 0.2  # RMS of |S| over sigma's maximum; speech of peak 1 has about 0.6
_GOOD_LEVEL = 0.5
_SNR = (-40.0, 30.0)  # dB


def check_signals(clips: Sequence[ClipFacts], room: str) -> Iterator[Finding]:
    """Judge every mix and target by itself, and the two together.

    Args:
        clips: the readable ones.
        room: "data" or "valid", the first part of the findings' names.
    """
    yield from _silence(clips, room)
    yield from _each(clips, room, "nonfinite", lambda wave: wave.nonfinite > 0, _NONFINITE, "error")
    yield from _each(clips, room, "clipping", lambda wave: wave.clipped > _CLIPPED, _CLIPPING)
    yield from _each(clips, room, "dc", _has_offset, _OFFSET)
    yield from _mixtures(clips, room)


def check_levels(cfg: Config, clips: Sequence[ClipFacts], dataset: Any) -> Iterator[Finding]:
    """Judge the training set's SNR, and its level against the noise of diffusion."""
    yield from _snr(clips, dataset)
    yield from _level(cfg, clips)


def names_of(clips: Sequence[ClipFacts]) -> str:
    """Name the first clips, and count the others."""
    named = ", ".join(clip.name for clip in clips[:_NAMED])
    return f"{named} and {len(clips) - _NAMED} more" if len(clips) > _NAMED else named


def _has_offset(wave: WaveFacts) -> bool:
    return not wave.silent and abs(wave.dc) > _DC * wave.rms


def _silence(clips: Sequence[ClipFacts], room: str) -> Iterator[Finding]:
    silent = [clip for clip in clips if clip.target is not None and clip.target.silent]
    if not silent:
        yield Finding("ok", f"{room}.silence", "no target file is silent", value=0)
        return
    share = len(silent) / len(clips)
    yield Finding(
        "error" if share >= 0.5 else "warning",
        f"{room}.silence",
        f"{len(silent)} of {len(clips)} targets are silent: {names_of(silent)}",
        value=share,
        limit=0.5,
        why="the model learns to put out silence, and SI-SDR is undefined",
        fix="remove these clips, or build the dataset again from louder speech",
    )


_NONFINITE = ("hold NaN or Inf", "the loss is NaN at once", "take them out or make them again")
_CLIPPING = (
    "are clipped",
    "the model learns distortion that the microphone or a conversion made",
    "make these files again at a lower level",
)
_OFFSET = (
    "have a DC offset",
    "the lowest bin holds a constant that is no speech, and padding adds clicks",
    "subtract the mean from the files",
)


def _each(
    clips: Sequence[ClipFacts],
    room: str,
    check: str,
    is_bad: Callable[[WaveFacts], bool],
    words: tuple[str, str, str],
    severity: Any = "warning",
) -> Iterator[Finding]:
    """Judge mix and target of every clip by one rule."""
    bad = [
        clip
        for clip in clips
        if any(wave is not None and is_bad(wave) for wave in (clip.mix, clip.target))
    ]
    what, why, fix = words
    if bad:
        yield Finding(
            severity,
            f"{room}.{check}",
            f"{len(bad)} of {len(clips)} clips {what}: {names_of(bad)}",
            value=len(bad),
            limit=0,
            why=why,
            fix=fix,
        )
    else:
        yield Finding("ok", f"{room}.{check}", f"no clips {what}", value=0, limit=0)


def _mixtures(clips: Sequence[ClipFacts], room: str) -> Iterator[Finding]:
    """Check mix = target + noise where noise.wav exists, and that there is noise at all."""
    told = [clip for clip in clips if clip.residual_db is not None]
    bad = [clip for clip in told if (clip.residual_db or 0) > _RESIDUAL_DB and not _silent(clip)]
    if bad:
        share = len(bad) / len(told)
        worst = max(clip.residual_db or 0 for clip in bad)
        yield Finding(
            "error" if share >= 0.5 else "warning",
            f"{room}.mixture",
            f"mixture is not vocals + noise in {len(bad)} of {len(told)} clips (off by "
            f"{worst:+.0f} dB of the target): {names_of(bad)}",
            value=worst,
            limit=_RESIDUAL_DB,
            why="the target is not what is in the mixture (stems swapped, shifted or scaled), so "
            "the model learns something else than to remove noise",
            fix="build these clips again with `diffbuf data build`",
        )
    elif told:
        yield Finding(
            "ok",
            f"{room}.mixture",
            f"mixture = vocals + noise in {len(told)} clips",
            value=max(clip.residual_db or -999.0 for clip in told),
            limit=_RESIDUAL_DB,
        )
    same = [clip for clip in clips if clip.snr_db is not None and clip.snr_db > 100]
    if same:
        yield Finding(
            "error" if len(same) >= len(clips) / 2 else "warning",
            f"{room}.noise",
            f"mix and target are the same in {len(same)} of {len(clips)} clips: {names_of(same)}",
            value=len(same),
            limit=0,
            why="there is no noise to remove: the model learns to copy",
            fix="check that the mix is the noisy file, or build the dataset again",
        )


def _snr(clips: Sequence[ClipFacts], dataset: Any) -> Iterator[Finding]:
    values = sorted(c.snr_db for c in clips if c.snr_db is not None and abs(c.snr_db) < 200)
    if not values:
        return
    middle = statistics.median(values)
    message = f"SNR {values[0]:.1f} to {values[-1]:.1f} dB, median {middle:.1f}"
    key = "data.snr_min" if isinstance(dataset, MixingDataset) else ""
    quantiles = {"min": values[0], "median": middle, "max": values[-1]}
    if _SNR[0] <= middle <= _SNR[1]:
        yield Finding("ok", "data.snr", message, value=quantiles, limit=list(_SNR), config_key=key)
        return
    low = middle < _SNR[0]
    yield Finding(
        "warning",
        "data.snr",
        message,
        value=quantiles,
        limit=list(_SNR),
        why="speech is buried too deep to be found" if low else "there is hardly noise to remove",
        fix="set data.snr_min=-30 and data.snr_max=0"
        if key
        else "build the dataset with --snr -30 0",
        config_key=key,
        overrides=("data.snr_min=-30", "data.snr_max=0") if key else (),
    )


def _level(cfg: Config, clips: Sequence[ClipFacts]) -> Iterator[Finding]:
    """Compare the target's compressed spectrum with the noise that diffusion adds to it.

    DN-LM attenuates speech by 1 / distance and then scales the mixture to full scale, so that |S|
    can lie far below sigma: what the score has to tell apart is then mostly the model's own noise.
    """
    spectral = Spectral.from_config(cfg.audio.stft, cfg.preprocessing.magnitude_compression)
    monos = [clip.wave.mean(dim=0) for clip in clips if clip.wave is not None and not _silent(clip)]
    monos = [mono for mono in monos if mono.shape == monos[0].shape and mono.isfinite().all()]
    levels = []
    if monos:
        power = spectral(torch.stack(monos)).abs().square()  # [N, F, K]
        sounding = (power.sum(dim=1) > 0).sum(dim=1)  # frames of zero padding do not count
        mean = power.sum(dim=(1, 2)) / (power.shape[1] * sounding.clamp_min(1))
        levels = mean[sounding > 0].sqrt().tolist()
    buffer, sde = cfg.diffusion_buffer, make_sde(cfg.sde)
    times = torch.linspace(buffer.t_eps, buffer.t_max, 200, dtype=torch.float64)
    sigma = float(sde.std(times).max())
    if not levels or not sigma:
        return
    level = statistics.median(levels)
    ratio = level / sigma
    message = f"RMS of |S| is {level:.3g}, {ratio:.2g} times sigma's maximum {sigma:.3g}"
    key = "preprocessing.magnitude_compression.beta"
    if ratio >= _LEVEL and ratio < 1 / _LEVEL:
        yield Finding("ok", "data.level", message, value=ratio, limit=_LEVEL, config_key=key)
        return
    beta = float(f"{cfg.preprocessing.magnitude_compression.beta * _GOOD_LEVEL / ratio:.2g}")
    yield Finding(
        "warning",
        "data.level",
        message,
        value=ratio,
        limit=_LEVEL if ratio < _LEVEL else 1 / _LEVEL,
        why="the speech drowns in the noise that diffusion itself adds, and what the model leaves "
        "of it is louder than the speech"
        if ratio < _LEVEL
        else "sigma hardly covers the difference of noisy and clean speech",
        fix=f"{'raise' if ratio < _LEVEL else 'lower'} {key} to {beta:g}, or scale the data",
        config_key=key,
        overrides=(f"{key}={beta:g}",),
    )


def _silent(clip: ClipFacts) -> bool:
    return clip.target is None or clip.target.silent
