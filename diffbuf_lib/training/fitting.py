"""Check that a checkpoint's place and optimizer state are of the kind that a run goes on from.

Torch checks the shapes of weights, but takes any optimizer state and fails at a later step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffbuf_lib.errors import CheckpointError

_COUNTS = ("step", "epoch", "examples", "bad_validations", "processes")


def check_place(state: Mapping[str, Any]) -> None:
    """Check the counts, the best score and the pending record of a checkpoint.

    Raises:
        CheckpointError: one is not what training writes; names it.
    """
    for name in _COUNTS:
        value = state[name]
        if not isinstance(value, int) or not 0 <= value < 2**62:
            raise CheckpointError(f"the checkpoint's {name} is no count: take another one")
    if not isinstance(state["best"], float | int | None):
        raise CheckpointError("the checkpoint's best is no score: take another one")
    if not isinstance(state["pending"], dict | None):
        raise CheckpointError("the checkpoint's pending record is none: take another one")


def check_optimizer(loaded: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Check an optimizer's state against a fresh optimizer of the same parameters.

    Args:
        loaded: as `state_dict` gave it.
        optimizer: the one that will load it.

    Raises:
        CheckpointError: it is another optimizer's, or damaged.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group, mine in zip(loaded["param_groups"], own, strict=True):
        for key, value in mine.items():
            if key != "params" and not _alike(value, group[key]):
                raise _unfit(f"its {key} is of another kind")
    for index, entry in loaded["state"].items():
        shape = parameters[index].shape
        for key, value in entry.items():
            scalar = key == "step"
            if isinstance(value, torch.Tensor):
                if value.shape != (torch.Size() if scalar else shape):
                    raise _unfit(f"its {key} of parameter {index} is {list(value.shape)}")
            elif not (isinstance(value, int | float) if scalar else value is None):
                raise _unfit(f"its {key} of parameter {index} is no tensor")


def check_scheduler(loaded: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check a scheduler's state against that of a fresh one.

    Raises:
        CheckpointError: it is another scheduler's, or damaged.
    """
    for key, value in own.items():
        if not _alike(value, loaded[key]):
            raise CheckpointError(f"the scheduler's state does not fit: its {key} is another kind")


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or one is None or isinstance(one, str):
        return type(one) is type(other)
    if isinstance(one, int | float):
        return isinstance(other, int | float) and not isinstance(other, bool)
    if isinstance(one, list | tuple):
        same = isinstance(other, list | tuple) and len(one) == len(other)
        return same and all(map(_alike, one, other))
    return True


def _unfit(problem: str) -> CheckpointError:
    return CheckpointError(
        f"the optimizer's state does not fit: {problem}; take another checkpoint"
    )
