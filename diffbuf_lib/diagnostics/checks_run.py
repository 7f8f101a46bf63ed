"""The doctor's look at a run: frames, noise schedule, machine, and one real training step."""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.diagnostics.findings import Finding, judge
from diffbuf_lib.diagnostics.watch import watch_modules
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.errors import ConfigError, DiffbufError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training.memory import (
    MemoryEstimate,
    SavedBytes,
    estimate_step,
    free_memory,
    saved_bytes,
)
from diffbuf_lib.training.signals import isolated

AUTHORS_SIGMA = 0.212  # the largest sigma of the authors' code, theta 0.08, k 2.6, t up to 1
FP16_MAX, FP32_MAX = 65504.0, 3.4e38
GIB = 2**30
_FAR = 3.0  # times larger or smaller than the authors': the confusion of c and theta is 3.5
_LITTLE_DISK = 2 * GIB  # checkpoints, logs and a model of a large run
_SCALES = (2.0**16, 2.0**8, 1.0)  # of the float16 loss: a scaler starts at the first
_SLOW = 1.0  # seconds of a pass on one clip from which on there are fewer of them
_LARGE = 8 * 96 * 63  # channels times frames from which on memory is estimated before it is taken
_PRECISIONS = {
    "cpu": {"bf16": torch.bfloat16},
    "cuda": {"bf16": torch.bfloat16, "fp16": torch.float16},
}


def check_frames(cfg: Config) -> Iterator[Finding]:
    """Count frames, exactly, and say what the buffer costs in time."""
    stft, rate, samples = cfg.audio.stft, cfg.audio.sample_rate, cfg.audio.chunk_size
    frames, Kb, K = cfg.audio.num_frames, cfg.diffusion_buffer.buffer_size, cfg.num_frames
    formula = "centred: 1 + T // hop" if stft.center else "not centred: 1 + (T - n_fft) // hop"
    bins, seconds = stft.n_fft // 2 + 1, samples / rate
    yield judge(
        "frames.count", frames, samples=samples, seconds=seconds, bins=bins, formula=formula
    )
    needed = (K - 1) * stft.hop_length + (0 if stft.center else stft.n_fft)
    short = frames < K
    yield judge("frames.window", K, frames, warning=short, needed=needed, seconds=needed / rate)
    half = max(1, frames // 2)
    yield judge("frames.buffer", Kb, half, warning=Kb > frames / 2, frames=frames)
    hop_ms, window_ms = (1000 * length / rate for length in (stft.hop_length, stft.n_fft))
    buffer_ms = (Kb - 1) * hop_ms
    yield judge(
        "frames.latency",
        buffer_ms + window_ms,
        info=True,
        buffer_ms=buffer_ms,
        hops=Kb - 1,
        hop_ms=hop_ms,
        window_ms=window_ms,
    )


def check_schedule(cfg: Config) -> Iterator[Finding]:
    """Follow sigma over the diffusion times of the buffer."""
    t_eps, t_max, sde = cfg.diffusion_buffer.t_eps, cfg.diffusion_buffer.t_max, make_sde(cfg.sde)
    sigma = sde.std(torch.linspace(t_eps, t_max, 1001, dtype=torch.float64))
    low, high = float(sigma.min()), float(sigma.max())
    yield judge("schedule.sigma", [low, high], t_eps=t_eps, t_max=t_max)
    yield _score_target(cfg, 1 / low if low > 0 else math.inf)
    if cfg.sde.type == "bbed":
        # The paper prints c = 0.08, its authors' code runs theta = c^2 = 0.08: 3.5 times the noise.
        bridge = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
        high = float(sde.std(bridge).max())
        ratio = high / AUTHORS_SIGMA
        far = not 1 / _FAR <= ratio <= _FAR
        yield judge("schedule.c_theta", high, AUTHORS_SIGMA, warning=far, ratio=ratio)
    if t_max < 0.3 or t_eps > 0.2:
        yield judge("schedule.times", [t_eps, t_max], [0.2, 0.3], warning=True)


def _score_target(cfg: Config, largest: float) -> Finding:
    """Compare the largest score target, 1 / sigma, with what number formats can hold."""
    training = cfg.training
    limit = FP32_MAX**0.5 if training.loss == "score" else FP32_MAX  # that loss takes squares
    if not largest < limit:
        check = "schedule.score_target/float32"
        return judge(check, largest, limit, error=True, loss=training.loss)
    in_float16 = training.use_amp and training.amp_dtype == "fp16"
    if in_float16 and largest > FP16_MAX and cfg.model.output_scale != "sigma":
        return judge("schedule.score_target/float16", largest, FP16_MAX, error=True)
    near = FP16_MAX / 64
    return judge("schedule.score_target", largest, near, warning=largest > near)


def resolve_device(name: str) -> torch.device:
    """Return the device that training takes for a `--device`: without a GPU the CPU.

    Raises:
        ConfigError: an unknown name, or a GPU that this machine does not have.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N")
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if int(number or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device {name} does not exist: this machine has {count} GPUs")
    return torch.device("cuda", int(number or 0))


def check_machine(cfg: Config, device: str, results_path: Path) -> Iterator[Finding]:
    """Look at what training would run on: `device` as asked for, and the disk it writes to."""
    yield from _versions()
    yield _disk(results_path)
    try:
        chosen = resolve_device(device)
    except ConfigError as error:
        yield judge("machine.device", device, error=True, message=str(error))
        return
    training, on_gpu = cfg.training, chosen.type == "cuda"
    gpu = torch.cuda.get_device_name(chosen) if on_gpu else f"{torch.get_num_threads()} CPU threads"
    message = f"{gpu}: {free_memory(chosen) / GIB:.1f} GiB of memory are free"
    yield judge("machine.device", str(chosen), info=not on_gpu, message=message)
    if not on_gpu and training.use_amp and training.amp_dtype == "fp16":
        yield judge("machine.precision", "float32", "fp16", info=True)
    wanted, key = training.deterministic, "machine.deterministic"
    workspace, allowed = os.environ.get("CUBLAS_WORKSPACE_CONFIG"), (None, ":4096:8", ":16:8")
    if wanted and on_gpu and workspace not in allowed:
        yield judge(f"{key}/workspace", workspace, list(allowed), error=True)
        return
    agree = "agree to the bit" if wanted else "may differ in last bits"
    yield judge(key, wanted, info=True, state=str(wanted).lower(), agree=agree, seed=training.seed)


def _versions() -> Iterator[Finding]:
    packages = ("torch", "torchaudio", "accelerate", "numpy")
    versions = {"python": platform.python_version(), **{p: _version(p) for p in packages}}
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield judge("machine.versions", versions, info=True, versions=text)
    pair = [versions[name].partition("+")[0] for name in ("torch", "torchaudio")]
    release, other = (version.rpartition(".")[0] for version in pair)
    differ = release != other
    yield judge("machine.torch_pair", pair, "one release", warning=differ, release=release)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _disk(path: Path) -> Finding:
    here = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not os.access(here, os.W_OK):
        return judge("machine.results", str(path), error=True)
    free = shutil.disk_usage(here).free
    little = free < _LITTLE_DISK
    return judge("machine.disk", free, _LITTLE_DISK, warning=little, gib=free / GIB, folder=here)


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass came to."""

    loss: float
    grad_norm: float  # of all gradients together, after unscaling
    nonfinite: int  # elements of gradients that are NaN or Inf
    seconds: float  # of both passes
    saved: SavedBytes  # what autograd kept
    where: str = ""  # first stage and module with a non-finite value; empty if all is well

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are."""
        return math.isfinite(self.loss) and self.nonfinite == 0


def run_pass(
    model: DiffusionBufferModel, mix: Tensor, target: Tensor, precision: torch.dtype | None
) -> Pass:
    """Run forward and backward once; in float16 with the scales that a scaler would try.

    Args:
        model: gets gradients.
        mix: [B, C, T] float32, full scale 1.
        target: [B, C, T].
        precision: of autocast; None: float32.
    """
    device, seed = mix.device, model.cfg.training.seed
    autocast = torch.autocast(device.type, precision, enabled=precision is not None)
    for scale in _SCALES if precision is torch.float16 else (1.0,):
        model.zero_grad()
        start = time.perf_counter()
        with saved_bytes(model) as saved:
            with autocast:
                loss = model(mix, target, torch.Generator(device).manual_seed(seed))
            (loss * scale).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        gradients = [p.grad / scale for p in model.parameters() if p.grad is not None]
        nonfinite = int(sum((~g.isfinite()).sum() for g in gradients))
        if nonfinite == 0:
            break
    where = ""
    if not loss.detach().isfinite():
        with torch.no_grad(), watch_modules(model, statistics=False) as watch, autocast:
            trace = model.trace(mix, target, torch.Generator(device).manual_seed(seed))
        where = f"stage {trace.summary().first_nonfinite}"
        where += f", module {watch.first_nonfinite}" if watch.first_nonfinite else ""
    norm = float(torch.nn.utils.get_total_norm(gradients))
    return Pass(float(loss.detach()), norm, nonfinite, seconds, saved, where)


def check_model(
    cfg: Config, clip: tuple[Tensor, Tensor] | None, device: torch.device
) -> Iterator[Finding]:
    """Build the model, make one training pass on a clip, and count memory.

    The clip is mix and target, [C, T] float32, full scale 1, each; None takes noise.
    """
    free = free_memory(device)
    if cfg.model.base_channels * cfg.audio.num_frames > _LARGE:
        rough = estimate_step(cfg)
        if rough.largest_batch(free) < 1:
            yield _memory(cfg, rough, free)
            return
    with isolated(device, deterministic=cfg.training.deterministic):
        torch.manual_seed(cfg.training.seed)
        try:
            model = DiffusionBufferModel(cfg).to(device).train()
            mix, target = clip or 0.1 * torch.randn(2, 1, cfg.audio.chunk_size)
            yield from _passes(cfg, model, mix[None].to(device), target[None].to(device), free)
        except (MemoryError, RuntimeError, DiffbufError) as error:
            reason = " ".join(str(error).split())[:300]
            full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in reason
            check = "model.memory/fails" if full else "model.step/fails"
            yield judge(check, error=True, device=device, reason=reason)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _passes(
    cfg: Config, model: DiffusionBufferModel, mix: Tensor, target: Tensor, free: int
) -> Iterator[Finding]:
    """Run in float32, then in the precision of the config; judge both, and the memory."""
    training, device = cfg.training, mix.device
    count = sum(p.numel() for p in model.parameters())
    name, channels = cfg.model.name, cfg.model.base_channels
    yield judge("model.parameters", count, info=True, name=name, channels=channels)
    measured = plain = run_pass(model, mix, target, None)
    yield _step("model.step", plain, "float32")
    precision = _PRECISIONS[device.type].get(training.amp_dtype)
    if training.use_amp and precision is not None:
        if plain.seconds < 3 * _SLOW:
            measured = run_pass(model, mix, target, precision)
            # Mixed precision is blamed only for what float32 can do.
            check = "model.step_amp" if plain.finite else "model.step"
            yield _step(check, measured, training.amp_dtype)
        else:
            name = training.amp_dtype
            yield judge("model.step_amp/skipped", plain.seconds, info=True, precision=name)
    model.zero_grad()
    yield _memory(cfg, estimate_step(cfg, model if measured.seconds < _SLOW else None), free)
    seconds, batch = measured.seconds, training.batch_size
    yield judge(
        "model.speed", seconds * batch, info=True, seconds=seconds, device=device, batch=batch
    )


def _step(check: str, outcome: Pass, precision: str) -> Finding:
    text = f"loss {outcome.loss:.4g}, gradient norm {outcome.grad_norm:.4g}"
    if not outcome.finite:
        text += f", {outcome.nonfinite} gradient elements not finite"
        text += f", first in {outcome.where}" if outcome.where else ""
        text += "; in float32 the same clip is finite" if check == "model.step_amp" else ""
    return judge(
        check,
        {
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "nonfinite_gradients": outcome.nonfinite,
            "seconds": outcome.seconds,
        },
        "finite",
        error=not outcome.finite,
        precision=precision,
        outcome=text,
    )


def _memory(cfg: Config, needed: MemoryEstimate, free: int) -> Finding:
    """Compare what a step takes with what is free."""
    batch, fits = cfg.training.batch_size, needed.largest_batch(free)
    total = needed.total(batch if fits else 1)
    return judge(
        "model.memory" if fits else "model.memory/one",
        {"needed": total, "fixed": needed.fixed, "per_clip": needed.per_clip, "fits": fits},
        free,
        error=batch > fits,
        warning=total > 0.85 * free,
        needed=total / GIB,
        free=free / GIB,
        batch=batch,
        channels=cfg.model.base_channels,
        fits=fits,
        safe=max(1, int(0.8 * fits)),  # what is free changes from one minute to the next
    )
