"""The doctor looks at machine, data, config and model before training, and says what is wrong.

Also here: statistics and watched modules while a model runs, and the capsules of failed steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from diffbuf_lib.config import Config, load_config
from diffbuf_lib.data.datasets import open_datasets
from diffbuf_lib.diagnostics import checks_data, checks_run
from diffbuf_lib.diagnostics.findings import Finding, from_error, has_error, judge, worst_first
from diffbuf_lib.diagnostics.statistics import gradient_statistics, score_statistics
from diffbuf_lib.diagnostics.watch import watch_modules
from diffbuf_lib.errors import ConfigError, DataError
from diffbuf_lib.model import resolve_device

__all__ = [
    "examine",
    "examine_paths",
    "gradient_statistics",
    "has_error",
    "score_statistics",
    "watch_modules",
]


def examine(
    cfg: Config,
    dataset: Any,  # for training, [i] -> (mix, target), each [C, T] float32, full scale 1; or None
    valid_set: Any = None,  # for validation
    *,
    device: str = "auto",  # as for `train`
    results_path: str | Path | None = None,  # where the run will write; None: the current folder
) -> list[Finding]:
    """Look at everything that training will meet, in a few seconds; the worst comes first.

    Files are sampled, and the model makes one forward and backward pass on one clip (two where
    mixed precision is configured). Global random state and torch's flags are left as they were.
    """
    where_to = Path(results_path or ".")
    findings = [*checks_run.check_machine(where_to), *checks_run.check_history(where_to)]
    if dataset is not None:
        findings += checks_data.check_data(cfg, dataset, valid_set)
    findings += [*checks_run.check_frames(cfg), *checks_run.check_schedule(cfg)]
    try:
        where = resolve_device(device, fallback=True)
    except ConfigError as error:
        findings.append(judge("machine.device", device, bad=True, message=str(error)))
    else:
        findings += checks_run.check_device(cfg, where)
        findings += checks_run.check_model(cfg, _first_clip(dataset), where)
    return worst_first(findings)


def examine_paths(
    config_path: str | Path,
    data_path: str | Path | Sequence[str | Path],
    valid_path: str | Path | Sequence[str | Path] | None = None,
    *,
    dataset_type: int = 1,
    overrides: Sequence[str] = (),
    **options: Any,  # of `examine`
) -> list[Finding]:
    """Open config and datasets, given as for `diffbuf doctor`, and `examine` them.

    What cannot be opened becomes an error, and what does not depend on it is still looked at.
    """
    try:
        cfg = load_config(config_path, overrides)
    except ConfigError as error:
        return [from_error(error, "config", "nothing can be run with this config")]
    sets: dict[str, Any] = {"data": None, "valid": None}
    findings: list[Finding] = []
    for name, path in (("data", data_path), ("valid", valid_path)):
        try:
            if path or name == "data":
                sets[name] = open_datasets(dataset_type, path or (), cfg, training=name == "data")
        except DataError as error:
            why = "training cannot start without its data"
            findings.append(from_error(error, f"{name}.open", why))
    findings += examine(cfg, *sets.values(), **options)
    return worst_first(findings)


def _first_clip(dataset: Any) -> tuple[Tensor, Tensor] | None:
    with suppress(Exception):  # the data checks tell why
        mix, target = dataset[0]
        if mix.shape == target.shape and mix.isfinite().all():
            return mix, target
    return None
