"""Training as a generator: one `StepRecord` an optimizer step.

A script exhausts it, a notebook takes `next(run)`. Whoever stops asking, by `close()`, Ctrl-C or
SIGTERM, can go on later with `resume=True` and gets the weights of a run that never stopped.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from torch import nn

from diffbuf_lib.config import Config
from diffbuf_lib.training.isolation import StopRequest
from diffbuf_lib.training.reading import ClipSource
from diffbuf_lib.training.record import StepRecord
from diffbuf_lib.training.run import Run

__all__ = ["StepRecord", "train"]


def train(
    cfg: Config,
    train_set: ClipSource,
    valid_set: ClipSource | None,
    results_path: str | Path,
    *,
    resume: bool = False,
    start_check_point: str | Path | None = None,
    device: str = "auto",
    progress: bool = False,
    model: nn.Module | None = None,
) -> Generator[StepRecord, None, None]:
    """Train, yielding a record after every optimizer step.

    The generator may be abandoned at any time: on `close()`, Ctrl-C, SIGTERM or an error between
    steps it saves a checkpoint and closes its logs. A signal waits for the end of a step and is
    then raised as KeyboardInterrupt; a second one does not wait, and saves nothing. For a loop
    whose body can fail, `with contextlib.closing(train(...)) as run:` closes at once.

    Args:
        cfg: the config; `cfg.training` is what matters here.
        train_set: `[i] -> (mix, target)`, each [C, T] float32, full scale 1.
        valid_set: the same; None or empty: no validation, and the learning rate stays.
        results_path: folder for checkpoints, logs and the model; see `training.results`.
        resume: go on with the run in `results_path`.
        start_check_point: a checkpoint file or a `save_pretrained` folder whose weights (averaged
            ones, if there) are the first ones. Not read when resuming.
        device: "auto", "cpu", "cuda" or "cuda:N". Without a CUDA device: a warning, and the CPU.
        progress: draw a progress bar on standard error.
        model: a model to train in place; default: a new one, seeded by `training.seed`.

    Yields:
        One record a step. A step is also one whose update the float16 scaler skipped.

    Raises:
        CheckpointError: the folder holds a run (without `resume`), none or one of another config
            (with it), weights do not fit, or a file cannot be written.
        NonFiniteError: the loss or gradient is NaN or infinite; names the files. The checkpoints
            are from before. With float16, infinite gradients are the scaler's search and no
            error, until its scale has fallen below 1.
        DataError: an empty training set, or a clip that cannot be read; names it.
        MissingExtraError, ConfigError: a metric or device that cannot be had.
    """
    stop = StopRequest()
    stop.install()
    run, abandoned = None, False
    try:
        with stop.running():
            run = Run(cfg, train_set, valid_set, results_path, device, model, stop)
            run.begin(resume=resume, start_check_point=start_check_point, progress=progress)
        while (record := run.advance()) is not None:
            yield record
    except (GeneratorExit, KeyboardInterrupt):
        abandoned = True
        raise
    finally:
        try:
            if run is not None:
                run.close(abandoned=abandoned)
        finally:
            stop.restore()
