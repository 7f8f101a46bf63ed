"""One optimizer step and one validation: the model, and all that changes or scores it."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffbuf_lib.config import Config, TrainingConfig
from diffbuf_lib.model import FORMATS, resolve_device
from diffbuf_lib.training import feed
from diffbuf_lib.training.metrics import mean_scores, score_clips
from diffbuf_lib.training.optimizer import make_optimizer, make_scheduler
from diffbuf_lib.training.signals import StopRequest

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's names; "no" is float32

_PARTS = ("model", "ema", "optimizer", "scheduler")  # of an engine, in a checkpoint


class Outcome(NamedTuple):
    """The result of a step; none was made if a loss or, without a scaler, the norm is bad."""

    losses: Tensor  # [W, R] float32 on the CPU: of every process and round
    grad_norm: float  # before clipping
    skipped: bool  # the gradient scaler found an overflow, made no step and lowered its scale
    stop: bool  # some process was asked to stop
    scale: float | None  # the gradient scaler's factor in this step; None without a scaler

    @property
    def loss(self) -> float:
        """Mean over processes and rounds."""
        return self.losses.double().mean().item()


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int  # counted from 1 over the whole run, resumed or not
    epoch: int  # counted from 0, as in `set_epoch`
    loss: float  # mean over the step's examples, on all processes
    grad_norm: float  # of all gradients together, before clipping; infinite in a skipped step
    lr: float  # with which the step was made
    seconds: float  # wall time, including reading but not validation
    # The weights stayed as they were: in float16 the gradients overflowed, and the scaler lowered
    # its scale, as it does now and then; or training.on_nonfinite=skip.
    skipped: bool = False
    valid: dict[str, float] | None = None  # of a validation: see `Validation.values`
    bad_batches: int = 0  # batches that the run has left out so far
    waited: float = 0.0  # the part of `seconds` spent waiting for clips

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


class Engine:
    """The model, trained in place, and all that changes it."""

    def __init__(
        self, cfg: Config, model: nn.Module, accelerator: Accelerator, total_steps: int
    ) -> None:
        training = cfg.training
        self.accelerator, self.grad_clip = accelerator, training.grad_clip
        self.model = model.to(accelerator.device)
        # Buffers are copied, not averaged: tables stay exact and counters stay integers.
        self.ema = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(training.ema_momentum), use_buffers=False
        )
        self.ema.requires_grad_(False).eval()
        self.parallel: Any = self.model
        if accelerator.num_processes > 1:
            self.parallel = accelerator.prepare_model(self.model)
        plain = make_optimizer(training, self.model)
        self.optimizer = accelerator.prepare_optimizer(plain)
        self.scheduler = make_scheduler(training, plain, total_steps)
        # Entered around each part of a step; `timing` sets a stopwatch.
        self.phase: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def scale(self) -> float | None:
        """The gradient scaler's factor on the loss; None without a scaler."""
        scaler = self.accelerator.scaler
        return None if scaler is None else float(scaler.get_scale())

    def step(self, batches: Sequence[feed.Batch], *, stop: bool = False) -> Outcome:
        """Make one optimizer step from the mean gradient of this process's batches, one per round.

        `stop` says whether this process was asked to stop; all learn of it in the one exchange
        that also collects the losses, so that they stop after the same step.
        """
        accelerator = self.accelerator
        self.model.train()
        self.optimizer.zero_grad()
        losses, scale = [], self.scale
        for round_, batch in enumerate(batches, start=1):
            last = round_ == len(batches)  # only then do the processes exchange gradients
            with contextlib.nullcontext() if last else accelerator.no_sync(self.parallel):
                with self.phase("forward"), accelerator.autocast():
                    loss = self.parallel(batch.mix, batch.target, generator=batch.generators)
                    loss = loss * batch.share
                with self.phase("backward"):
                    accelerator.backward(loss / len(batches))
            losses.append(loss.detach().float())
        report = torch.stack([*losses, losses[0].new_tensor(float(stop))])
        gathered = accelerator.gather(report).view(-1, len(report)).cpu()
        all_losses, stop = gathered[:, :-1], bool(gathered[:, -1].any())
        if not all_losses.isfinite().all():
            return Outcome(all_losses, math.nan, False, stop, scale)
        with self.phase("optimizer"):
            grad_norm, skipped = self._update()
        return Outcome(all_losses, grad_norm, skipped, stop, scale)

    def _update(self) -> tuple[float, bool]:
        """Clip, step, average; return the gradient norm before clipping and whether skipped."""
        self.accelerator.unscale_gradients()
        norm = gradient_norm(self.model)
        if self.accelerator.scaler is None and not norm.isfinite():
            return norm.item(), False
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.grad_clip, norm)
        self.optimizer.step()
        skipped = bool(self.accelerator.optimizer_step_was_skipped)
        if not skipped:
            self.ema.update_parameters(self.model)
        return norm.item(), skipped

    def count_step(self) -> None:
        """Advance a learning rate that follows steps, even if the step changed no weight."""
        if isinstance(self.scheduler, LambdaLR):
            with warnings.catch_warnings():  # torch wants an update of the weights before the first
                warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step")
                self.scheduler.step()

    def count_validation(self, score: float) -> None:
        """Advance a learning rate that follows validations."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)

    def scale_lr(self, factor: float) -> None:
        """Scale the learning rate, wherever a schedule has brought it."""
        for group in self.optimizer.param_groups:
            for name in {"lr", "initial_lr"} & group.keys():
                group[name] *= factor
        if isinstance(self.scheduler, LambdaLR):
            self.scheduler.base_lrs = [lr * factor for lr in self.scheduler.base_lrs]

    def is_finite(self) -> bool:
        """Whether every weight and buffer, averaged ones too, is finite."""
        tensors = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later run needs to go on, by name."""
        scaler = self.accelerator.scaler
        state = {name: getattr(self, name).state_dict() for name in _PARTS}
        return {**state, "scaler": None if scaler is None else scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; a scaler's state only if both have a scaler."""
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Undo what wrapping did to the caller's model."""
        if self.parallel is not self.model:
            self.accelerator.unwrap_model(self.parallel, keep_fp32_wrapper=False)


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients together, a scalar."""
    return torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)


def precision_on(training: TrainingConfig, device: torch.device) -> str:
    """Return the mixed precision that a device trains in: "no", "bf16" or "fp16"."""
    able = device.type == "cuda" or training.amp_dtype == "bf16"
    return training.amp_dtype if training.use_amp and able else "no"


def make_accelerator(training: TrainingConfig, device: str) -> Accelerator:
    """Choose the device (see `resolve_device`) and precision; warn if they are not as asked for."""
    chosen = resolve_device(device, fallback=True)
    on_cpu, precision = chosen.type == "cpu", precision_on(training, chosen)
    if on_cpu and (device.startswith("cuda") or (training.use_amp and precision == "no")):
        why = "training.use_amp with fp16 needs a CUDA device"
        why = "no CUDA device" if device.startswith("cuda") else why
        name = "bfloat16" if precision == "bf16" else "float32"
        warnings.warn(f"{why}: training on the CPU in {name}", stacklevel=2)
    if ":" in device and not on_cpu:
        torch.cuda.set_device(chosen)  # accelerate's "cuda" is torch's current device
    # Accelerate keeps one state per process and refuses any precision or device but its first.
    # Reset it, since a notebook trains more than once; a process group, though, has to stay.
    AcceleratorState._reset_state(not torch.distributed.is_initialized())
    return Accelerator(cpu=on_cpu, mixed_precision=precision)


def fastest_format(cfg: Config, accelerator: Accelerator) -> tuple[str, str]:
    """Return the memory format in which a CPU trains faster, and the times that show it.

    A convolution of the network's width runs forward and backward, for up to a second in all: which
    gradient is slow in which format differs between CPUs, by up to a factor of two. The result is
    channels_last unless contiguous saves a tenth of the time, and without a measurement where it
    was never found slower: on GPUs, in half precision, in narrow networks.
    """
    training, width = cfg.training, 2 * cfg.model.base_channels
    half = accelerator.mixed_precision != "no"
    if training.memory_format != "auto":
        return training.memory_format, ""
    if accelerator.device.type != "cpu" or half or width < 128 or training.deterministic:
        return "channels_last", ""
    layer = nn.Conv2d(width, width, 3, padding=1)
    taken: dict[str, list[float]] = {name: [] for name in FORMATS}
    for name in 5 * list(FORMATS):  # the first of each also sets things up
        layer.to(memory_format=FORMATS[name])  # type: ignore[call-overload]
        x = torch.ones(1, width, 64, 64).contiguous(memory_format=FORMATS[name])
        started = time.perf_counter()
        layer(x.requires_grad_()).sum().backward()
        taken[name].append(time.perf_counter() - started)
        if len(taken["contiguous"]) > 1 and sum(map(sum, taken.values())) > 0.5:
            break
    last, contiguous = (1e3 * min(times[1:]) for times in taken.values())
    name = "contiguous" if contiguous < 0.9 * last else "channels_last"
    return name, f"{name} ({last:.1f} ms channels_last, {contiguous:.1f} contiguous)"


class Validation(NamedTuple):
    """The result of a validation."""

    values: dict[str, float]  # "loss", every metric's mean, and `<metric>_clips`: over how many
    example: tuple[Tensor, ...] | None  # mix, target, estimate of the first clip, each [T]


@torch.no_grad()
def validate(
    cfg: Config,
    model: Any,
    dataset: feed.ClipSource,
    accelerator: Accelerator,
    stop: StopRequest | None = None,
) -> Validation | None:
    """Enhance and score the first `training.valid_clips` clips, in float32.

    Every clip has its own generator, seeded by (seed, clip): the same noise at every validation,
    whatever the batch size or the number of processes. Returns None if any process was asked to
    stop; the example only in the main process.
    """
    training, device = cfg.training, accelerator.device
    count, processes = min(training.valid_clips, len(dataset)), accelerator.num_processes
    mine = list(range(accelerator.process_index, count, processes))
    batches = [mine[i : i + training.batch_size] for i in range(0, len(mine), training.batch_size)]
    most = math.ceil(count / processes)  # clips of the first process: all exchange equally often
    reader = feed.ClipReader(dataset).read(batches)

    model.eval()
    feed.seed_everything(training.seed, feed.Stream.VALID)
    results: list[tuple[int, dict[str, float]]] = []
    example = None
    for round_ in range(math.ceil(most / training.batch_size)):
        flag = torch.tensor([float(stop is not None and stop.requested)], device=device)
        if accelerator.gather(flag).any():
            return None
        if round_ >= len(batches):
            continue
        mix, target = (wave.to(device) for wave in next(reader))
        key = [(clip,) for clip in batches[round_]], training.seed, feed.Stream.VALID, device
        loss = model(mix, target, generator=feed.example_generators(*key)).item()
        estimate = model.enhance(mix, generator=feed.example_generators(*key))  # [B, C, T]
        estimate, clean = estimate.mean(1).cpu(), target.mean(1).cpu()  # [B, T]
        scores = score_clips(estimate, clean, cfg.audio.sample_rate, training.metrics)
        for i, clip in enumerate(batches[round_]):
            values = {name: score[i].item() for name, score in scores.items()}
            results.append((clip, {"loss": loss, **values}))
        if round_ == 0 and accelerator.is_main_process:
            example = (mix[0].mean(0).cpu(), clean[0], estimate[0])
    results = gather_object(results) if processes > 1 else results
    results.sort(key=lambda result: result[0])  # by clip, so that sums round alike
    columns = {name: [values[name] for _, values in results] for name in results[0][1]}
    means = {"loss": statistics.fmean(columns.pop("loss"))}
    for name, score in mean_scores({n: torch.tensor(c) for n, c in columns.items()}).items():
        means |= {name: score.mean, f"{name}_clips": float(score.scored)}
    return Validation(means, example)
