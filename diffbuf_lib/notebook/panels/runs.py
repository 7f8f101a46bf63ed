"""The files of a run: opened anew or gone on with, removed, and read back as records."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

from diffbuf_lib.config import Config
from diffbuf_lib.training import StepRecord, train
from diffbuf_lib.training.feed import ClipSource
from diffbuf_lib.training.folder import ResultsFolder, read_history


def open_run(
    cfg: Config,
    train_set: ClipSource,
    valid_set: ClipSource | None,
    folder: ResultsFolder,
    device: str,
) -> Generator[StepRecord, None, None]:
    """Begin the run of a folder, or go on with it if it has a checkpoint; arguments of `train`."""
    resume = folder.last.is_file()
    return train(cfg, train_set, valid_set, folder.path, resume=resume, device=device)


def remove_run(results_path: str | Path) -> None:
    """Remove the files of a run, and nothing else that may be in its folder.

    Args:
        results_path: the run's folder; it may be missing, and no run may go on there.
    """
    folder = ResultsFolder(results_path)
    capsules = folder.path.glob("capsule_*")
    for path in (folder.last.parent, folder.model, folder.tensorboard, *capsules):
        shutil.rmtree(path, ignore_errors=True)
    for file in (folder.config, folder.history):
        file.unlink(missing_ok=True)


def read_records(folder: ResultsFolder) -> list[StepRecord]:
    """Return the steps of a run's history, each with the validation that followed it."""
    records: dict[int, dict[str, Any]] = {}
    for line in read_history(folder.history):
        if "loss" in line:
            numbers = {key: float("nan") for key, value in line.items() if value is None}
            records[line["step"]] = {**line, **numbers}
        elif line["step"] in records:
            records[line["step"]]["valid"] = line["valid"]
    return [StepRecord(**fields) for fields in records.values()]
