"""What a training run tells its caller after every step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Args:
        step: counted from 1 over the whole run, resumed or not.
        epoch: counted from 0, as in `set_epoch`.
        loss: mean over the step's examples, on all processes.
        grad_norm: of all gradients together, before clipping. Infinite in a skipped step.
        lr: the learning rate that the step was made with.
        seconds: wall time of the step, reading included, validation not.
        skipped: float16 only: the gradients overflowed, the weights were left as they were and
            the gradient scaler lowered its scale. Normal now and then. Also with
            training.on_nonfinite=skip, for a batch with a loss or gradient that is not finite.
        valid: on the last record of an epoch with validation, and of a run: "loss", the metrics'
            means, and `<metric>_clips`, over how many clips; else None.
        bad_batches: non-finite batches that the run has left out so far.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    skipped: bool = False
    valid: dict[str, float] | None = None
    bad_batches: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)
