"""What to say of a loss or gradient that is NaN or infinite: where, with what, what to try."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import gather_object

from diffbuf_lib.training.feed import Batch, ClipSource, EpochPlan
from diffbuf_lib.training.step import Engine, Outcome


def describe(
    outcome: Outcome,
    batches: Sequence[Batch],
    rounds: range,
    *,
    engine: Engine,
    plan: EpochPlan,
    train_set: ClipSource,
    step: int,
    epoch: int,
) -> tuple[str, int] | None:
    """Describe a step that was not made because its loss or gradient is not finite.

    With float16 an infinite gradient is how the gradient scaler finds its scale, and no error: the
    step is skipped and the scale halved. It is one when the scale has fallen below 1, where
    float16 has no more range to give.

    Args:
        outcome: of the step, with the losses of all processes.
        batches: this process's batches.
        rounds: which rounds they are.
        engine: for the learning rate and the precision.
        plan: says which clips every process had.
        train_set: names them.
        step: counted from 1.
        epoch: counted from 0.

    Returns:
        The message, in every process alike, and the first process with a bad loss; None for a
        step that was made.
    """
    finite = outcome.losses.isfinite()  # [W, R]
    scale = engine.scale
    if not finite.all():
        culprits = [(rounds[r], int(rank)) for rank, r in (~finite).nonzero().tolist()]
        value = outcome.losses[~finite][0].item()
        what = f"the loss is {value}"
    elif scale is not None and scale < 1:
        culprits = [(round_, rank) for round_ in rounds for rank in range(plan.processes)]
        what = f"the gradient overflows float16 even at loss scale {scale:g}"
    elif scale is None and not abs(outcome.grad_norm) < float("inf"):
        culprits = [(round_, rank) for round_ in rounds for rank in range(plan.processes)]
        what = f"the loss is {outcome.loss:.4g} but the gradient norm is {outcome.grad_norm}"
    else:
        return None

    order = plan.order(epoch)
    names = [
        train_set.name(order[position])
        for round_, rank in culprits
        for position in plan.positions(round_, rank)
    ]
    damaged = _damaged_clips(batches, rounds, engine, plan, [train_set.name(i) for i in order])
    advice = (
        f"{', '.join(damaged)} holds samples that are not finite: take it out or make it again"
        if damaged
        else "try a lower training.lr, training.grad_clip=1, training.use_amp=false or a larger "
        "diffusion_buffer.t_eps"
    )
    message = (
        f"step {step} (epoch {epoch}): {what}; batch {', '.join(names)}; lr {engine.lr:g}; mixed "
        f"precision {_precision(engine)}. {advice}. The checkpoints are from before"
    )
    return message, min(rank for _, rank in culprits)


def _damaged_clips(
    batches: Sequence[Batch], rounds: range, engine: Engine, plan: EpochPlan, names: list[str]
) -> list[str]:
    """Return the names of clips, of all processes, that hold a NaN or an infinity."""
    mine = [
        names[position]
        for round_, batch in zip(rounds, batches, strict=True)
        for j, position in enumerate(plan.positions(round_, engine.accelerator.process_index))
        if not (batch.mix[j].isfinite().all() and batch.target[j].isfinite().all())
    ]
    return gather_object(mine) if plan.processes > 1 else mine


def _precision(engine: Engine) -> str:
    precision = engine.accelerator.mixed_precision
    scale = "" if engine.scale is None else f", loss scale {engine.scale:g}"
    return "off" if precision == "no" else f"{precision}{scale}"
