"""One training step again, under hooks: which stage, module or gradient was the first bad one.

The same walk serves a run that has just failed and the replay of its capsule. It changes neither
weights nor gradients: gradients are taken with `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.trace import Trace
from diffbuf_lib.training.feed import Batch
from diffbuf_lib.training.finding import (
    Finding,
    Visit,
    bad_tensors,
    check_files,
    check_sigma,
    count_bad,
    finding_of,
    first_bad_gradient,
    visit,
)

_BEFORE = ("Y", "S", "t", "sigma", "z", "V")  # stages before the network, in their order
_AFTER = ("score", "x0_hat", "target_score", "loss_map", "loss")
_STAGES = tuple(f.name for f in fields(Trace))


@dataclass
class Autopsy:
    """What a walk through a step came to.

    Args:
        losses: one a round, as far as it got.
        grad_norm: of the mean gradient; NaN where there is none.
        finding: the first bad value; None if all is finite.
        visits: every stage and module output, in order.
        bad_parameters: names of weights and buffers that are not finite, before the step.
        draws: t and z of every round.
        trace: the stages of the last round walked.
        gradients: of every trained parameter, by name; None where the loss does not reach.
        error: the exception that ended the walk.
    """

    losses: list[float] = field(default_factory=list)
    grad_norm: float = float("nan")
    finding: Finding | None = None
    visits: list[Visit] = field(default_factory=list)
    bad_parameters: list[str] = field(default_factory=list)
    draws: list[dict[str, Tensor]] = field(default_factory=list)
    trace: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    error: Exception | None = None


def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[Sequence[str]],
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    scale: float = 1.0,
    backward: bool = True,
) -> Autopsy:
    """Walk the rounds of a step until the first bad value.

    Args:
        model: as it was before the step; seed the global generators, for dropout, before.
        batches: their generators are used up.
        names: of the examples' files, a list a round.
        autocast: a fresh context of the step's precision.
        scale: of the gradient scaler.
        backward: whether to take gradients too.
    """
    result = Autopsy(bad_parameters=bad_tensors(model))
    events: list[tuple[str, str, int]] = []
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    totals: list[Tensor | None] = [None] * len(trained)
    model.train()
    for round_, batch in enumerate(batches):
        result.finding = result.finding or check_files(batch, names[round_], round_)
        try:
            with _hooked(model, round_, result.visits, events) as trace, torch.enable_grad():
                with autocast():
                    loss = model(batch.mix, batch.target, generator=batch.generators)
                result.losses.append(float(loss.detach()))
                if backward:
                    _add_gradients(model, loss / len(batches) * scale, totals)
        except Exception as error:
            result.error = error
            result.trace = stages_of(error.__traceback__)
            result.finding = result.finding or finding_of(error, model, round_)
        else:
            result.trace = dict(trace)
        result.draws.append({k: result.trace[k] for k in ("t", "z") if k in result.trace})
        _visit_stages(result, round_)
        if result.error is None and result.finding is None:
            result.finding = _first_bad(result, model, float(loss.detach()), round_)
        if result.error is not None or result.finding is not None:
            return result
    result.gradients = {
        name: None if g is None else g / scale for name, g in zip(trained, totals, strict=True)
    }
    gradients = [g for g in result.gradients.values() if g is not None]
    if gradients:
        result.grad_norm = torch.nn.utils.get_total_norm(gradients).item()
    if not all(bool(g.isfinite().all()) for g in gradients):
        result.finding = first_bad_gradient(events)
    return result


def stages_of(traceback: TracebackType | None) -> dict[str, Tensor]:
    """Return the stages that a failed `trace` had reached, from its frame."""
    found: dict[str, Tensor] = {}
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "trace":
            local = frame.f_locals
            found = {k: local[k] for k in _STAGES if isinstance(local.get(k), Tensor)}
        traceback = traceback.tb_next
    return found


@contextmanager
def _hooked(
    model: nn.Module, round_: int, visits: list[Visit], events: list[tuple[str, str, int]]
) -> Iterator[dict[str, Tensor]]:
    """Note every module's output and gradients, and the trace; leave nothing behind."""
    trace: dict[str, Tensor] = {}
    handles: list[Any] = []

    def note(kind: str, name: str, gradient: Tensor) -> None:
        events.append((kind, name, count_bad(gradient)))

    def seen(name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            visits.append(visit("module", name, tensor, round_))
            if tensor.requires_grad:
                handles.append(tensor.register_hook(partial(note, "module", name)))

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(partial(seen, name)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(partial(note, "parameter", name)))

    original = getattr(model, "trace", None)
    if callable(original):

        def tracing(*args: Any, **kwargs: Any) -> Any:
            got = original(*args, **kwargs)
            if is_dataclass(got):
                stages = {k: getattr(got, k, None) for k in _STAGES}
                trace.update({k: v.detach() for k, v in stages.items() if isinstance(v, Tensor)})
            return got

        model.__dict__["trace"] = tracing
    try:
        yield trace
    finally:
        model.__dict__.pop("trace", None)
        for handle in handles:
            handle.remove()


def _add_gradients(model: nn.Module, loss: Tensor, totals: list[Tensor | None]) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for i, gradient in enumerate(gradients):
        total = totals[i]
        if gradient is not None:
            totals[i] = gradient if total is None else total + gradient


def _visit_stages(result: Autopsy, round_: int) -> None:
    """Put the stages around the network's modules, which hooks have noted."""
    earlier = [v for v in result.visits if v.round < round_]
    modules = [v for v in result.visits if v.round == round_]
    made = {
        name: visit("file" if name in ("mix", "target") else "stage", name, value, round_)
        for name, value in result.trace.items()
    }
    before = [made[k] for k in ("mix", "target", *_BEFORE) if k in made]
    after = [made[k] for k in _AFTER if k in made]
    spectral = ("spectral", "framing")  # their outputs are the stages Y and S
    modules = [v for v in modules if v.name.split(".")[0] not in spectral]
    result.visits = [*earlier, *before, *modules, *after]


def _first_bad(result: Autopsy, model: nn.Module, loss: float, round_: int) -> Finding | None:
    for seen in result.visits:
        if seen.round != round_:
            continue
        if seen.name == "sigma" and (found := check_sigma(result.trace, round_)):
            return found
        if seen.bad:
            size = list(seen.shape)
            detail = f"its output {size} holds {seen.bad} NaN or Inf, the first on the way"
            if seen.kind == "module":
                own = [n for n in result.bad_parameters if n.rpartition(".")[0] == seen.name]
                detail += f"; {' and '.join(own)} is not finite" if own else ""
            return Finding(seen.kind, seen.name, detail, round_)
    if loss != loss or abs(loss) == float("inf"):
        return Finding("stage", "forward", f"returns {loss} though every stage is finite", round_)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
