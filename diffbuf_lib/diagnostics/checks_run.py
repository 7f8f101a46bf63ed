"""The doctor's look at a run: frames, noise schedule, machine, and one real training step."""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data.reader import reason
from diffbuf_lib.diagnostics.findings import Finding, Severity, judge
from diffbuf_lib.diagnostics.watch import watch_modules
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.errors import DiffbufError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import memory
from diffbuf_lib.training.folder import read_history
from diffbuf_lib.training.signals import isolated
from diffbuf_lib.training.step import DTYPES, precision_on

AUTHORS_SIGMA = 0.212  # the largest sigma of the authors' code, theta 0.08, k 2.6, t up to 1
FP16_MAX, FP32_MAX = 65504.0, 3.4e38
GIB = 2**30
_FAR = 3.0  # times larger or smaller than the authors': confusing c with theta gives 3.5
_LITTLE_DISK = 2  # GiB: checkpoints, logs and a model of a large run
_SCALES = (2.0**16, 2.0**8, 1.0)  # of the float16 loss: a scaler starts at the first
_SLOW = 1.0  # seconds of a pass on one clip; from 3 times that on, only one is made
_LARGE = 8 * 96 * 63  # channels times frames from which on memory is estimated before it is used


def check_frames(cfg: Config) -> Iterator[Finding]:
    """Count frames, exactly, and say what the buffer costs in time."""
    stft, rate, samples = cfg.audio.stft, cfg.audio.sample_rate, cfg.audio.chunk_size
    frames, Kb, K = cfg.audio.num_frames, cfg.diffusion_buffer.buffer_size, cfg.num_frames
    formula = "centred: 1 + T // hop" if stft.center else "not centred: 1 + (T - n_fft) // hop"
    facts: dict[str, Any] = {"seconds": samples / rate, "bins": stft.n_fft // 2 + 1}
    yield judge("frames.count", frames, cfg=cfg, formula=formula, **facts)
    needed = (K - 1) * stft.hop_length + (0 if stft.center else stft.n_fft)
    facts = {"needed": needed, "seconds": needed / rate}
    yield judge("frames.window", K, frames, bad=frames < K, **facts)
    yield judge("frames.buffer", Kb, max(1, frames // 2), bad=Kb > frames / 2, cfg=cfg)
    hop_ms, window_ms = (1000 * length / rate for length in (stft.hop_length, stft.n_fft))
    buffer_ms = (Kb - 1) * hop_ms
    facts = {"buffer_ms": buffer_ms, "hops": Kb - 1, "hop_ms": hop_ms, "window_ms": window_ms}
    yield judge("frames.latency", buffer_ms + window_ms, **facts)


def check_schedule(cfg: Config) -> Iterator[Finding]:
    """Follow sigma over the diffusion times of the buffer."""
    t_eps, t_max, sde = cfg.diffusion_buffer.t_eps, cfg.diffusion_buffer.t_max, make_sde(cfg.sde)
    sigma = sde.std(torch.linspace(t_eps, t_max, 1001, dtype=torch.float64))
    low, high = float(sigma.min()), float(sigma.max())
    yield judge("schedule.sigma", [low, high], cfg=cfg)
    yield _score_target(cfg, 1 / low if low > 0 else math.inf)
    if cfg.sde.type == "bbed":
        # The paper prints c = 0.08, its authors' code runs theta = c^2 = 0.08: 3.5 times the noise.
        high = float(sde.std(torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]).max())
        ratio = high / AUTHORS_SIGMA
        far = not 1 / _FAR <= ratio <= _FAR
        yield judge("schedule.c_theta", high, AUTHORS_SIGMA, bad=far, ratio=ratio)
    if t_max < 0.3 or t_eps > 0.2:
        yield judge("schedule.times", [t_eps, t_max], [0.2, 0.3], bad=True)


def _score_target(cfg: Config, largest: float) -> Finding:
    """Compare the largest score target, 1 / sigma, with what number formats can hold."""
    limit = FP32_MAX**0.5 if cfg.training.loss == "score" else FP32_MAX  # it takes squares
    if not largest < limit:
        return judge("schedule.score_target/float32", largest, limit, bad=True, cfg=cfg)
    in_float16 = cfg.training.use_amp and cfg.training.amp_dtype == "fp16"
    if in_float16 and largest > FP16_MAX and cfg.model.output_scale != "sigma":
        return judge("schedule.score_target/float16", largest, FP16_MAX, bad=True)
    near = FP16_MAX / 64
    return judge("schedule.score_target", largest, near, bad=largest > near)


def check_machine(results_path: Path) -> Iterator[Finding]:
    """Look at the packages, and at the disk that training would write to."""
    packages = ("torch", "torchaudio", "accelerate", "numpy")
    versions = [f"{package} {metadata.version(package)}" for package in packages]
    yield judge("machine.versions", f"python {platform.python_version()}, {', '.join(versions)}")
    path = results_path.absolute()
    folder = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(folder).free / GIB
    yield judge("machine.disk", free, _LITTLE_DISK, bad=free < _LITTLE_DISK, folder=folder)
    if not os.access(folder, os.W_OK):
        yield judge("machine.results", str(path), bad=True)


def check_history(results_path: Path) -> Iterator[Finding]:
    """Report a run whose loss has not fallen by a twentieth after a hundred or more steps."""
    lines = read_history(results_path / "history.jsonl")
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if len(losses) >= 100:
        first, last = median(losses[:20]), median(losses[-max(20, len(losses) // 5) :])
        if last > first - 0.05 * abs(first):
            yield judge("run.learning", last, first, bad=True, steps=len(losses))


def check_device(cfg: Config, device: torch.device) -> Iterator[Finding]:
    """Say what training would run on, and in which precision if it is not the one asked for."""
    cuda, threads = device.type == "cuda", f"{torch.get_num_threads()} CPU threads"
    name = torch.cuda.get_device_name(device) if cuda else threads
    message = f"{name}: {memory.free_memory(device) / GIB:.1f} GiB of memory are free"
    yield judge("machine.device", str(device), message=message)
    if cfg.training.use_amp and precision_on(cfg.training, device) == "no":
        yield judge("machine.precision", "float32", "fp16")


class Pass(NamedTuple):
    """The result of one forward and backward pass."""

    loss: float
    grad_norm: float  # of all gradients together, after unscaling
    nonfinite: int  # elements of gradients that are NaN or Inf
    seconds: float  # of both passes
    saved: memory.SavedBytes  # what autograd kept
    where: str = ""  # first stage and module with a non-finite value; empty if all is well

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are finite."""
        return math.isfinite(self.loss) and self.nonfinite == 0


def run_pass(
    model: DiffusionBufferModel, mix: Tensor, target: Tensor, precision: torch.dtype | None
) -> Pass:
    """Run forward and backward once; in float16 with the scales that a scaler would try.

    Mix and target are [B, C, T] float32, full scale 1; precision None is float32.
    """
    device, seed = mix.device, model.cfg.training.seed
    autocast = torch.autocast(device.type, precision, enabled=precision is not None)
    for scale in _SCALES if precision is torch.float16 else (1.0,):
        model.zero_grad()
        start = time.perf_counter()
        with memory.saved_bytes(model) as saved:
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
    cfg: Config,
    clip: tuple[Tensor, Tensor] | None,  # mix and target, [C, T] float32, full scale 1; None: noise
    device: torch.device,
) -> Iterator[Finding]:
    """Build the model, make one training pass on a clip, and count memory."""
    free = memory.free_memory(device)
    try:
        if cfg.model.base_channels * cfg.audio.num_frames > _LARGE:
            rough = memory.estimate_step(cfg)
            if rough.largest_batch(free) < 1:
                yield _check_memory(cfg, rough, free)
                return
        with isolated(device, deterministic=cfg.training.deterministic):
            torch.manual_seed(cfg.training.seed)
            model = DiffusionBufferModel(cfg).to(device).train()
            mix, target = clip or 0.1 * torch.randn(2, 1, cfg.audio.chunk_size)
            mix, target = mix[None].to(device), target[None].to(device)
            yield from _check_passes(cfg, model, mix, target, free)
    except (MemoryError, RuntimeError, DiffbufError) as error:
        check = "model.memory/fails" if memory.is_out_of_memory(error) else "model.step/fails"
        yield judge(check, bad=True, device=device, reason=reason(error)[:300])


def _check_passes(
    cfg: Config, model: DiffusionBufferModel, mix: Tensor, target: Tensor, free: int
) -> Iterator[Finding]:
    """Run in float32, then in the precision of the config; judge both, and the memory."""
    training, device = cfg.training, mix.device
    yield judge("model.parameters", sum(p.numel() for p in model.parameters()), cfg=cfg)
    measured = plain = run_pass(model, mix, target, None)
    yield _check_pass("model.step", plain, "float32")
    name = precision_on(training, device)
    if name in DTYPES and plain.seconds < 3 * _SLOW:
        measured = run_pass(model, mix, target, DTYPES[name])
        # Mixed precision is blamed only if float32 succeeds.
        yield _check_pass("model.step_amp" if plain.finite else "model.step", measured, name)
    elif name in DTYPES:
        yield judge("model.step_amp/skipped", plain.seconds, precision=name)
    yield _check_memory(cfg, memory.step_memory(model, training.optimizer, measured.saved), free)
    step = measured.seconds * training.batch_size
    yield judge("model.speed", step, seconds=measured.seconds, device=device, cfg=cfg)


def _check_pass(check: str, outcome: Pass, precision: str) -> Finding:
    text = f"loss {outcome.loss:.4g}, gradient norm {outcome.grad_norm:.4g}"
    if not outcome.finite:
        text += f", {outcome.nonfinite} gradient elements not finite"
        text += f", first in {outcome.where}" if outcome.where else ""
        text += "; in float32 the same clip is finite" if check == "model.step_amp" else ""
    bad, value = not outcome.finite, outcome._asdict()
    return judge(check, value, "finite", bad=bad, precision=precision, outcome=text)


def _check_memory(cfg: Config, needed: memory.MemoryEstimate, free: int) -> Finding:
    """Compare what a step takes with what is free."""
    batch, fits = cfg.training.batch_size, needed.largest_batch(free)
    total = needed.total(batch if fits else 1)
    value = {"needed": total / GIB, "fits": fits}
    bad: Severity | bool = "error" if batch > fits else total > 0.85 * free
    safe = max(1, int(0.8 * fits))  # what is free changes from one minute to the next
    check = "model.memory" if fits else "model.memory/one"
    return judge(check, value, free / GIB, bad, cfg=cfg, safe=safe)
