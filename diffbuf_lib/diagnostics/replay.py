"""Make the step of a capsule again, and compare what it comes to with what it came to then."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import diffbuf_lib.model
from diffbuf_lib.errors import CheckpointError, ConfigError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training.autopsy import Autopsy, walk
from diffbuf_lib.training.feed import Batch
from diffbuf_lib.training.finding import Finding, Visit, finding_of
from diffbuf_lib.training.folder import apply_weights
from diffbuf_lib.training.optimizer import make_optimizer
from diffbuf_lib.training.signals import isolated

if TYPE_CHECKING:
    from diffbuf_lib.diagnostics.capsule import Capsule, Record

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_AFTERWARDS = ("gradient", "error")  # kinds of finding that no stage or module's output shows


@dataclass(frozen=True)
class ReplayResult:
    """What the step came to this time, beside what it came to then.

    Args:
        reproduced: it failed at the same place in the same way.
        same_numbers: losses and gradient norm are those of the failed step to the bit.
        finding: the first bad value now; None: nothing failed.
        expected: the first bad value then.
        losses: one a round, as far as the step got.
        grad_norm: NaN where there was none.
        visits: every stage and module output up to the first bad one, in order.
        error: the exception of the replay.
        autopsy: all of it, the stages' tensors too.
    """

    reproduced: bool
    same_numbers: bool
    finding: Finding | None
    expected: Finding | None
    losses: list[float]
    grad_norm: float
    visits: list[Visit]
    error: Exception | None
    autopsy: Autopsy

    def __str__(self) -> str:
        """Return the walk as a table, and the verdict."""
        lines = [f"{'':8} {'':28} {'shape':22} {'dtype':10} {'NaN/Inf':>8} {'largest':>10}"]
        for v in self.visits:
            shape = "x".join(map(str, v.shape)) or "scalar"
            line = f"{v.kind:8} {v.name:28} {shape:22} {v.dtype:10} {v.bad:8} {v.largest:10.4g}"
            lines.append(line)
        if self.finding is not None and self.finding.kind not in _AFTERWARDS:
            lines[-1] += "  <-- first bad value"
        lines += [
            f"loss {', '.join(f'{x:.6g}' for x in self.losses) or 'none'}; "
            f"gradient norm {self.grad_norm:.6g}",
            f"then: {self.expected or 'an exception outside of any module'}",
            f"now:  {self.finding or 'nothing fails'}",
            f"same failure: {'yes' if self.reproduced else 'no'}; "
            f"same numbers: {'yes' if self.same_numbers else 'no'}",
        ]
        return "\n".join(lines)


def replay_step(capsule: Capsule, device: str, model: nn.Module | None) -> ReplayResult:
    """Do the work of `Capsule.replay`, which has the arguments' meaning."""
    where, record = _device(device), capsule.record
    threads = torch.get_num_threads()
    with isolated(where, deterministic=capsule.cfg.training.deterministic):
        model = _model(capsule, model).to(where)
        try:
            torch.set_num_threads(record.threads)
            _seed(capsule, where)
            with _saved_draws(capsule.batch, len(record.seeds)):
                autopsy = walk(
                    model,
                    _batches(capsule, where),
                    record.files,
                    autocast=_autocast(where, record.precision),
                    scale=record.scale or 1.0,
                )
            if autopsy.finding is None:
                _update(capsule, model, autopsy)
        finally:
            torch.set_num_threads(threads)
    return _compare(record, autopsy)


def _compare(record: Record, autopsy: Autopsy) -> ReplayResult:
    found = autopsy.finding
    expected = record.finding
    reproduced = found is not None and expected is not None
    if found is not None and expected is not None:
        reproduced = (found.kind, found.name) == (expected.kind, expected.name)
        if expected.kind == "error":  # the round of an exception was not known then
            reproduced = reproduced and type(autopsy.error).__name__ == record.error["type"]
        else:
            reproduced = reproduced and found.round == expected.round
    same = _bits(autopsy.losses) == _bits(record.losses) or not record.losses
    same = same and (_bits([autopsy.grad_norm]) == _bits([record.grad_norm]) or not record.losses)
    return ReplayResult(
        reproduced,
        reproduced and same,
        found,
        expected,
        autopsy.losses,
        autopsy.grad_norm,
        _until(autopsy.visits, found),
        autopsy.error,
        autopsy,
    )


def _model(capsule: Capsule, model: nn.Module | None) -> nn.Module:
    """Build the model, of which every layer must be there as a tensor, and load the weights."""
    weights, cfg = capsule.state["model"], capsule.cfg.model
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{capsule.path / 'state.json'} holds weights that are no tensors")
    source = capsule.path / "state.safetensors"
    if model is None:
        layers = max(cfg.num_layers, cfg.num_res_blocks * len(cfg.channel_multipliers))
        if layers > len(weights):
            raise CheckpointError(f"weights of {source} do not fit: {layers} layers are asked")
        try:
            with torch.device("meta"):  # no memory yet: the shapes come from a stranger
                shapes = DiffusionBufferModel(capsule.cfg).state_dict()
        except (RuntimeError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"weights of {source} do not fit its config") from error
        for name, value in shapes.items():
            if name not in weights or weights[name].shape != value.shape:
                raise CheckpointError(
                    f"weights of {source} do not fit: {name} is {list(value.shape)} in a model "
                    f"of its config (the run's model was a {capsule.record.model_class}; a model "
                    "of your own goes to replay(model=...))"
                )
        model = DiffusionBufferModel(capsule.cfg)
    apply_weights(model, weights, source)
    return model


def _batches(capsule: Capsule, device: torch.device) -> list[Batch]:
    batches = []
    for i, seeds in enumerate(capsule.record.seeds):
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        if device.type == capsule.record.device:
            for generator, state in zip(generators, capsule.batch[f"{i}/generators"], strict=False):
                _restore(generator.set_state, state, capsule.path)
        mix, target = (capsule.batch[f"{i}/{name}"].to(device) for name in ("mix", "target"))
        batches.append(Batch(mix, target, generators))
    return batches


def _seed(capsule: Capsule, device: torch.device) -> None:
    """Set the global generators, which dropout draws from; `isolated` puts them back."""
    rng = capsule.rng
    try:
        numbers = rng["numpy"].tolist()
        keys = np.array(numbers[:-1], np.uint32)
        np.random.set_state(("MT19937", keys, int(numbers[-1]), 0, 0.0))
        random.setstate((3, tuple(rng["python"].tolist()), None))
        _restore(torch.set_rng_state, rng["torch"], capsule.path)
        if device.type == "cuda" and "cuda" in rng:
            _restore(
                lambda state: torch.cuda.set_rng_state(state, device), rng["cuda"], capsule.path
            )
    except (KeyError, ValueError, TypeError, OverflowError, IndexError) as error:
        raise CheckpointError(f"capsule {capsule.path}: rng.safetensors is damaged") from error


def _update(capsule: Capsule, model: nn.Module, autopsy: Autopsy) -> None:
    """Make the optimizer's step too, where forward and backward pass did not fail."""
    training = capsule.cfg.training
    try:
        optimizer = make_optimizer(training, model)
        optimizer.load_state_dict(capsule.state["optimizer"])
        parameters = dict(model.named_parameters())
        for name, gradient in autopsy.gradients.items():
            parameters[name].grad = gradient
        if training.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
    except Exception as error:
        autopsy.error, autopsy.finding = error, finding_of(error, model)


@contextmanager
def _saved_draws(batch: dict[str, Tensor], rounds: int) -> Iterator[None]:
    """Let the model draw the saved diffusion times and noise, round by round."""
    module = diffbuf_lib.model

    def saved(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        round_ = iter(range(rounds))

        def draw(*args: Any, **kwargs: Any) -> Tensor:
            value = batch.get(f"{next(round_, -1)}/{name}")
            drawn = original(*args, **kwargs)
            fits = value is not None and value.shape == drawn.shape and value.dtype == drawn.dtype
            return value.to(drawn.device) if fits and value is not None else drawn

        return draw

    with (
        patch.object(module, "draw_times", saved("t", module.draw_times)),
        patch.object(module, "complex_normal", saved("z", module.complex_normal)),
    ):
        yield


def _autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    dtype = _DTYPES.get(precision)
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is none of cpu, cuda, cuda:N") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= count
    ):
        raise ConfigError(f"device {name} does not exist: this machine has {count} GPUs")
    return device


def _restore(setter: Callable[[Tensor], object], state: Tensor, path: Path) -> None:
    try:
        setter(state.clone())  # of a row: torch reads from the start of its memory
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"capsule {path}: a generator's state is damaged") from error


def _until(visits: Sequence[Visit], found: Finding | None) -> list[Visit]:
    """Return the way up to the first bad value, and that."""
    if found is None or found.kind in _AFTERWARDS:
        return list(visits)
    name = "sigma" if found.kind == "sigma" else found.name
    for i, visit in enumerate(visits):
        wrong = visit.bad or (found.kind == "sigma" and visit.name == name)
        if visit.round == found.round and wrong:
            return list(visits[: i + 1])
    return list(visits)


def _bits(values: Sequence[float]) -> list[str]:
    return [float(value).hex() for value in values]
