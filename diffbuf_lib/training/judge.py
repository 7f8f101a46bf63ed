"""What validations decide: which one is the best, and when the run has seen enough."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from diffbuf_lib.config import TrainingConfig


@dataclass
class Judge:
    """Keeps count of the scores of `training.metric_for_scheduler`.

    Args:
        training: the metric's name and `early_stopping`.
        best: best score so far.
        bad_validations: validations since then.
    """

    training: TrainingConfig
    best: float | None = None
    bad_validations: int = 0

    @property
    def enough(self) -> bool:
        """Whether `training.early_stopping` validations in a row brought no gain."""
        limit = self.training.early_stopping
        return limit is not None and self.bad_validations >= limit

    def score(self, values: dict[str, float]) -> float | None:
        """Pick the deciding score of a validation; None, with a warning, if it is not finite.

        A score that could not be computed for a single clip decides nothing.
        """
        name = self.training.metric_for_scheduler
        if math.isfinite(values[name]):
            return values[name]
        warnings.warn(
            f"no validation clip has a finite {name}: learning rate and early stopping wait",
            stacklevel=2,
        )
        return None

    def gains(self, score: float) -> bool:
        """Count a score; return whether it is the best so far. Losses are better when lower."""
        lower_is_better = self.training.metric_for_scheduler == "loss"
        if self.best is None or (score < self.best if lower_is_better else score > self.best):
            self.best, self.bad_validations = score, 0
            return True
        self.bad_validations += 1
        return False
