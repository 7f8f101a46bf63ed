"""The doctor's look at the model: one real forward and backward pass, and the memory it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.diagnostics.checks_machine import GIB
from diffbuf_lib.diagnostics.findings import Finding
from diffbuf_lib.diagnostics.trial import Pass, autocast, run_pass
from diffbuf_lib.errors import DiffbufError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training.memory import (
    MemoryEstimate,
    estimate_step,
    free_memory,
    network_estimate,
    saved_bytes,
)

_SLOW = 1.0  # seconds of a pass on one clip from which on there is only one
_LARGE = 8 * 96 * 63  # channels times frames from which on memory is estimated before it is taken
_SLOW_STEP = 60.0  # seconds


def check_model(
    cfg: Config, clip: tuple[Tensor, Tensor] | None, device: torch.device
) -> Iterator[Finding]:
    """Build the model, train on one clip for one step, and count memory.

    Args:
        cfg: the config.
        clip: mix and target, [C, T] float32 each; None takes noise.
        device: where.
    """
    from diffbuf_lib.training.signals import isolated

    free = free_memory(device)
    if cfg.model.base_channels * cfg.audio.num_frames > _LARGE:
        rough = network_estimate(cfg)
        if rough.largest_batch(free) < 1:
            yield _too_large(cfg, rough, free)
            return
    with isolated(device, deterministic=cfg.training.deterministic):
        torch.manual_seed(cfg.training.seed)
        try:
            model = DiffusionBufferModel(cfg).to(device).train()
            yield _size(model)
            yield from _passes(cfg, model, clip or _noise_clip(cfg), device, free)
        except DiffbufError as error:
            yield Finding(
                "error",
                "model.step",
                f"one training step fails: {error}",
                why="training would stop at its first step",
                fix="change what the message names",
            )
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in reason
            key = "model.base_channels" if memory else ""
            yield Finding(
                "error",
                "model.memory" if memory else "model.step",
                f"one clip on {device} fails: {reason[:300]}",
                value=cfg.training.batch_size,
                why="training would stop at its first step",
                fix="lower model.base_channels or audio.chunk_size" if memory else "report this",
                config_key=key,
            )
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _passes(
    cfg: Config,
    model: DiffusionBufferModel,
    clip: tuple[Tensor, Tensor],
    device: torch.device,
    free: int,
) -> Iterator[Finding]:
    """Run in float32, then in the precision of the config; judge both, and the memory."""
    mix, target = (wave[None].to(device) for wave in clip)  # [1, C, T]
    plain = run_pass(model, mix, target, None)
    yield _judge(cfg, plain, "fp32", None)

    measured = plain
    precision = _amp(cfg, device)
    if precision is not None and plain.seconds < 3 * _SLOW:
        mixed = measured = run_pass(model, mix, target, precision)
        yield _judge(cfg, mixed, cfg.training.amp_dtype, plain)
    elif precision is not None:
        yield Finding(
            "info",
            "model.step_amp",
            f"{cfg.training.amp_dtype} was not tried: float32 took {plain.seconds:.1f} s",
            value=plain.seconds,
            config_key="training.use_amp",
        )
    model.zero_grad()
    two = None
    if measured.seconds < _SLOW:
        with saved_bytes(model) as two, autocast(device, precision):
            loss = model(mix.repeat(2, 1, 1), target.repeat(2, 1, 1))
        del loss
    needed = estimate_step(cfg, model)
    yield _memory(cfg, needed, free)
    yield _speed(cfg, measured.seconds, device)


def _judge(cfg: Config, outcome: Pass, precision: str, plain: Pass | None) -> Finding:
    check = "model.step" if plain is None else "model.step_amp"
    numbers = f"loss {outcome.loss:.4g}, gradient norm {outcome.grad_norm:.4g}"
    value = {
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "nonfinite_gradients": outcome.nonfinite,
        "seconds": outcome.seconds,
    }
    message = f"one step on one clip in {precision}: {numbers}"
    if outcome.finite:
        return Finding("ok", check, message, value=value, limit="finite")
    where = f", first in {outcome.where}" if outcome.where else ""
    message += f", {outcome.nonfinite} gradient elements not finite{where}"
    if plain is not None and plain.finite:
        return Finding(
            "error",
            check,
            f"{message}; in float32 the same clip is finite",
            value=value,
            limit="finite",
            why="every step would be skipped, or stop the run",
            fix="set training.use_amp=false"
            + (" or training.amp_dtype=bf16" if precision == "fp16" else ""),
            config_key="training.use_amp",
            overrides=("training.use_amp=false",),
        )
    return Finding(
        "error",
        check,
        message,
        value=value,
        limit="finite",
        why="training would stop at its first step",
        fix="look at the stage that is named: a level of the data far from full scale 1, or "
        "sde.diffusion and diffusion_buffer.t_eps",
        config_key="diffusion_buffer.t_eps",
    )


def _size(model: DiffusionBufferModel) -> Finding:
    count = sum(p.numel() for p in model.parameters())
    name = f"{model.cfg.model.name}, {model.cfg.model.base_channels} channels"
    return Finding("info", "model.parameters", f"{count:,} parameters ({name})", value=count)


def _memory(cfg: Config, needed: MemoryEstimate, free: int) -> Finding:
    """Compare what a step takes with what is free."""
    batch, fits = cfg.training.batch_size, needed.largest_batch(free)
    total = needed.total(batch)
    if fits < 1:
        return _too_large(cfg, needed, free)
    value = {"needed": total, "fixed": needed.fixed, "per_clip": needed.per_clip, "fits": fits}
    common: dict[str, Any] = {"value": value, "limit": free, "config_key": "training.batch_size"}
    message = (
        f"training.batch_size {batch} takes about {total / GIB:.2f} GiB of "
        f"{free / GIB:.1f} GiB free; the largest that fits is {fits}"
    )
    safe = max(1, int(0.8 * fits))  # what is free changes from one minute to the next
    if batch > fits:
        return Finding(
            "error",
            "model.memory",
            message,
            why="training would run out of memory at its first step",
            fix=f"lower training.batch_size to {safe}, or model.base_channels; "
            "training.accumulation_steps makes up for smaller batches",
            overrides=(f"training.batch_size={safe}",),
            **common,
        )
    if total > 0.85 * free:
        return Finding(
            "warning",
            "model.memory",
            message,
            why="there is little room for what else runs on this machine",
            fix=f"lower training.batch_size to {safe}",
            overrides=(f"training.batch_size={safe}",),
            **common,
        )
    return Finding("ok", "model.memory", message, **common)


def _too_large(cfg: Config, needed: MemoryEstimate, free: int) -> Finding:
    return Finding(
        "error",
        "model.memory",
        f"one clip takes about {needed.total(1) / GIB:.2f} GiB of {free / GIB:.1f} GiB free",
        value={"needed": needed.total(1), "fixed": needed.fixed, "per_clip": needed.per_clip},
        limit=free,
        why="training would run out of memory even with training.batch_size=1",
        fix=f"lower model.base_channels (now {cfg.model.base_channels}) or audio.chunk_size",
        config_key="model.base_channels",
    )


def _speed(cfg: Config, seconds: float, device: torch.device) -> Finding:
    """Guess a step's time from one clip's: right on a CPU, too long on a GPU that idles."""
    step = seconds * cfg.training.batch_size
    message = f"one clip took {seconds:.2f} s on {device}; a step of {cfg.training.batch_size}"
    if step > _SLOW_STEP and device.type == "cpu":
        return Finding(
            "info",  # a slow machine is nobody's mistake, and train.py says that it is the CPU
            "model.speed",
            f"{message} would take about {step:.0f} s",
            value=step,
            limit=_SLOW_STEP,
            why="an epoch will take hours",
            fix="train on a GPU, or lower model.base_channels or training.batch_size",
            config_key="model.base_channels",
        )
    return Finding("info", "model.speed", f"{message} takes at most {step:.2g} s", value=step)


def _amp(cfg: Config, device: torch.device) -> torch.dtype | None:
    """Return the type that training computes in, as `make_accelerator` chooses it."""
    if not cfg.training.use_amp:
        return None
    if cfg.training.amp_dtype == "bf16":
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def _noise_clip(cfg: Config) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(cfg.training.seed)
    mix, target = 0.1 * torch.randn(2, 1, cfg.audio.chunk_size, generator=generator)
    return mix, target
