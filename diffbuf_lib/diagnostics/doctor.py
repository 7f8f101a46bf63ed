"""The doctor: look at machine, data, config and model before training, and say what is wrong.

`examine` takes a config and datasets that could be opened, `examine_paths` the arguments of the
command line: then a config or folder that cannot be opened is a finding itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffbuf_lib.config import Config, load_config
from diffbuf_lib.data.datasets import open_dataset
from diffbuf_lib.diagnostics.checks_data import check_data
from diffbuf_lib.diagnostics.checks_run import (
    check_frames,
    check_machine,
    check_model,
    check_schedule,
    resolve_device,
)
from diffbuf_lib.diagnostics.findings import Finding, from_error, has_error, worst_first
from diffbuf_lib.errors import ConfigError, DataError

__all__ = ["Finding", "examine", "examine_paths", "has_error"]


def examine(
    cfg: Config,
    dataset: Any,
    valid_set: Any = None,
    *,
    device: str = "auto",
    results_path: str | Path | None = None,
) -> list[Finding]:
    """Look at everything that training will meet, in a few seconds.

    Files are sampled, and the model makes one forward and backward pass on one clip (two where
    mixed precision is configured). Global random state and torch's flags are left as they were.

    Args:
        cfg: the config.
        dataset: the training set: `[i] -> (mix, target)`, each [C, T] float32, full scale 1.
        valid_set: the validation set, or None.
        device: "auto", "cpu", "cuda" or "cuda:N", as for `train`.
        results_path: where the run will write; its disk is looked at.

    Returns:
        Findings, the worst first.
    """
    findings = [*check_machine(cfg, device, Path(results_path or "."))]
    findings += check_data(cfg, dataset, valid_set)
    findings += check_frames(cfg)
    findings += check_schedule(cfg)
    try:
        where = resolve_device(device)
    except ConfigError:  # machine.device has told it
        return worst_first(findings)
    return worst_first([*findings, *check_model(cfg, _first_clip(dataset), where)])


def examine_paths(
    config_path: str | Path,
    data_path: str | Path,
    valid_path: str | Path | None = None,
    *,
    dataset_type: int = 1,
    overrides: Sequence[str] = (),
    device: str = "auto",
    results_path: str | Path | None = None,
) -> list[Finding]:
    """Open config and datasets and `examine` them.

    The arguments are those of `diffbuf doctor`. What cannot be opened becomes an error, and what
    does not depend on it is still looked at.
    """
    try:
        cfg = load_config(config_path, overrides)
    except ConfigError as error:
        return [from_error(error, "config", "nothing can be run with this config")]
    sets: dict[str, Any] = {}
    findings: list[Finding] = []
    for name, path in (("data", data_path), ("valid", valid_path)):
        try:
            if path is not None:
                sets[name] = open_dataset(dataset_type, path, cfg, training=name == "data")
        except DataError as error:
            why = "training cannot start without its data"
            findings.append(from_error(error, f"{name}.open", why))
    found = examine(
        cfg, sets.get("data", ()), sets.get("valid"), device=device, results_path=results_path
    )
    if "data" not in sets:  # that nothing is in it needs no telling
        found = [finding for finding in found if finding.check != "data.size"]
    return worst_first([*findings, *found])


def _first_clip(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Return a readable clip of the set, if one of the first few is."""
    for index in range(min(len(dataset), 3)):
        try:
            mix, target = dataset[index]
        except Exception:  # the data checks tell why
            continue
        if mix.ndim == 2 and mix.shape == target.shape and mix.isfinite().all():
            return mix, target
    return None
