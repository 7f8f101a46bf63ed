"""What learns: the model, its averaged copy, the optimizer and what changes the learning rate.

`Engine.step` is one optimizer step over one or several batches; `state_dict` is all of it.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffbuf_lib.config import Config, TrainingConfig
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.training.feed import (
    Batch,
    ClipSource,
    Stream,
    example_generators,
    read_batches,
    seed_everything,
)
from diffbuf_lib.training.metrics import mean_scores, score_clips
from diffbuf_lib.training.optimizer import (
    LinearRate,
    check_optimizer,
    check_scheduler,
    make_optimizer,
    make_scheduler,
)


@dataclass(frozen=True)
class Outcome:
    """What one optimizer step came to.

    Args:
        losses: [W, R] float32 on the CPU: of every process and round. Not finite: no step was made.
        grad_norm: before clipping. Not finite without a gradient scaler: no step was made.
        skipped: the gradient scaler found an overflow, made no step and lowered its scale.
        stop: some process was asked to stop.
        scale: the gradient scaler's factor in this step; None without a scaler.
    """

    losses: torch.Tensor
    grad_norm: float
    skipped: bool
    stop: bool
    scale: float | None = None

    @property
    def loss(self) -> float:
        """Mean over processes and rounds."""
        return self.losses.double().mean().item()


def make_accelerator(training: TrainingConfig, device: str) -> Accelerator:
    """Choose the device and the precision; warn, in one line, where they are not what was asked.

    Args:
        training: for `use_amp` and `amp_dtype`.
        device: "auto" (CUDA if there is), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: a device of another kind, or a GPU number that this machine does not have.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise ConfigError(f"device {device!r} is none of auto, cpu, cuda, cuda:N")
    available = torch.cuda.is_available()
    on_cpu = kind == "cpu" or not available
    fp16_on_cpu = on_cpu and training.use_amp and training.amp_dtype == "fp16"
    if kind == "cuda" and not available:
        precision = "bfloat16" if training.use_amp and not fp16_on_cpu else "float32"
        warnings.warn(f"no CUDA device: training on the CPU in {precision}", stacklevel=2)
    elif fp16_on_cpu:
        warnings.warn(
            "training.use_amp with fp16 needs a CUDA device: training on the CPU in float32",
            stacklevel=2,
        )
    precision = training.amp_dtype if training.use_amp and not fp16_on_cpu else "no"
    if number and not on_cpu:
        if int(number) >= torch.cuda.device_count():
            raise ConfigError(
                f"device {device} does not exist: this machine has {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(int(number))  # accelerate's "cuda" is torch's current device
    # Accelerate keeps one state a process and refuses another precision or device than its
    # first. A notebook trains more than once; a process group, though, has to stay.
    AcceleratorState._reset_state(not torch.distributed.is_initialized())
    return Accelerator(cpu=on_cpu, mixed_precision=precision)


class Engine:
    """The model and all that changes it.

    Args:
        cfg: the config.
        model: a `DiffusionBufferModel`; it is trained in place.
        accelerator: device, precision and processes.
        total_steps: of the whole run, for a learning rate that falls along it.
    """

    def __init__(
        self, cfg: Config, model: nn.Module, accelerator: Accelerator, total_steps: int
    ) -> None:
        training = cfg.training
        self.accelerator = accelerator
        self.grad_clip = training.grad_clip
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

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def count_step(self) -> None:
        """Move a learning rate that goes by steps."""
        if isinstance(self.scheduler, LinearRate):
            self.scheduler.step()

    def judge(self, score: float) -> None:
        """Move a learning rate that goes by validations."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)

    @property
    def scale(self) -> float | None:
        """The gradient scaler's factor on the loss; None without a scaler."""
        scaler = self.accelerator.scaler
        return None if scaler is None else float(scaler.get_scale())

    def step(self, batches: Sequence[Batch], *, stop: bool = False) -> Outcome:
        """Make one optimizer step from the mean gradient of some rounds.

        Args:
            batches: this process's batch of every round.
            stop: whether this process was asked to stop; all learn of it in the one exchange that
                also collects the losses, so that they stop after the same step.
        """
        accelerator = self.accelerator
        self.model.train()
        self.optimizer.zero_grad()
        losses, scale = [], self.scale
        for round_, batch in enumerate(batches, start=1):
            last = round_ == len(batches)  # only then do the processes exchange gradients
            with contextlib.nullcontext() if last else accelerator.no_sync(self.parallel):
                with accelerator.autocast():
                    loss = self.parallel(batch.mix, batch.target, generator=batch.generators)
                accelerator.backward(loss / len(batches))
            losses.append(loss.detach().float())
        report = torch.stack([*losses, losses[0].new_tensor(float(stop))])
        gathered = accelerator.gather(report).view(-1, len(report)).cpu()
        all_losses, stop = gathered[:, :-1], bool(gathered[:, -1].any())
        if not all_losses.isfinite().all():
            return Outcome(all_losses, float("nan"), False, stop, scale)
        grad_norm, skipped = self._update()
        return Outcome(all_losses, grad_norm, skipped, stop, scale)

    def _update(self) -> tuple[float, bool]:
        """Clip, step, average; return the gradient norm before clipping and whether skipped."""
        self.accelerator.unscale_gradients()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        grad_norm = norm.item()
        if self.accelerator.scaler is None and not norm.isfinite():
            return grad_norm, False
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        self.optimizer.step()
        skipped = bool(self.accelerator.optimizer_step_was_skipped)
        if not skipped:
            self.ema.update_parameters(self.model)
        return grad_norm, skipped

    def is_finite(self) -> bool:
        """Whether every weight and buffer, averaged ones too, is finite."""
        tensors = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later run needs to go on, by name."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        A gradient scaler's state is left out where this machine trains without one, and starts
        anew where the earlier one did.
        """
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        check_optimizer(state["optimizer"], self.optimizer)
        self.optimizer.load_state_dict(state["optimizer"])
        check_scheduler(state["scheduler"], self.scheduler.state_dict())
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Undo what wrapping did to the caller's model."""
        if self.parallel is not self.model:
            self.accelerator.unwrap_model(self.parallel, keep_fp32_wrapper=False)


@dataclass(frozen=True)
class Validation:
    """What a validation came to.

    Args:
        values: "loss", every metric's mean, and `<metric>_clips`: how many clips it is over.
        example: mix, target and estimate of the first clip, each [T]; None on other processes.
    """

    values: dict[str, float]
    example: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


def validate(
    cfg: Config,
    model: nn.Module,
    dataset: ClipSource,
    accelerator: Accelerator,
    should_stop: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """Enhance and score the first `training.valid_clips` clips, in float32.

    Every clip has its own generator, seeded by (seed, clip): the same noise at every validation,
    whatever the batch size or the number of processes.

    Args:
        cfg: the config.
        model: the averaged model; is left in eval mode.
        dataset: the validation set, not empty.
        accelerator: process i of W takes every W-th clip.
        should_stop: asked before each batch.

    Returns:
        None when some process was asked to stop.

    Raises:
        DataError: a clip cannot be read; names it.
    """
    training, device = cfg.training, accelerator.device
    count, processes = min(training.valid_clips, len(dataset)), accelerator.num_processes
    mine = list(range(accelerator.process_index, count, processes))
    batches = [mine[i : i + training.batch_size] for i in range(0, len(mine), training.batch_size)]
    most = math.ceil(count / processes)  # clips of the first process: all exchange as often
    rounds = math.ceil(most / training.batch_size)
    reader = read_batches(dataset, batches)

    model.eval()
    seed_everything(training.seed, Stream.VALID)
    results: list[tuple[int, float, dict[str, float]]] = []
    example = None
    for round_ in range(rounds):
        flag = torch.tensor([float(should_stop())], device=device)
        if accelerator.gather(flag).any():
            return None
        if round_ >= len(batches):
            continue
        mix, target = (wave.to(device) for wave in next(reader))
        loss, estimate = _run_model(model, mix, target, batches[round_], training.seed)
        estimate, clean = estimate.mean(1).cpu(), target.mean(1).cpu()  # [B, T]
        scores = score_clips(estimate, clean, cfg.audio.sample_rate, training.metrics)
        for i, clip in enumerate(batches[round_]):
            results.append((clip, loss, {name: v[i].item() for name, v in scores.items()}))
        if round_ == 0 and accelerator.is_main_process:
            example = (mix[0].mean(0).cpu(), clean[0], estimate[0])
    return Validation(_average(_gathered(results, processes), training.metrics), example)


@torch.no_grad()
def _run_model(
    model: nn.Module, mix: torch.Tensor, target: torch.Tensor, clips: list[int], seed: int
) -> tuple[float, torch.Tensor]:
    """Return the mean loss and the estimates [B, C, T]."""
    keys = [(clip,) for clip in clips]
    generators = example_generators(keys, seed, Stream.VALID, mix.device)
    loss = model(mix, target, generator=generators).item()
    generators = example_generators(keys, seed, Stream.VALID, mix.device)
    return loss, model.enhance(mix, generator=generators)  # type: ignore[operator]


def _gathered(results: list[tuple[int, float, dict[str, float]]], processes: int) -> list:
    """Return all processes' results in the order of the clips, so that sums round alike."""
    everything = gather_object(results) if processes > 1 else results
    return sorted(everything, key=lambda result: result[0])


def _average(results: list, metrics: tuple[str, ...]) -> dict[str, float]:
    values = {"loss": sum(loss for _, loss, _ in results) / len(results)}
    scores = {name: torch.tensor([result[2][name] for result in results]) for name in metrics}
    for name, score in mean_scores(scores).items():
        values[name] = score.mean
        values[f"{name}_clips"] = float(score.scored)
    return values
