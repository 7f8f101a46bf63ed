"""`diffbuf train|doctor|replay`."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from diffbuf_lib.commands.common import Overrides, say
from diffbuf_lib.config import Config, load_config
from diffbuf_lib.errors import ConfigError


def train_command(
    config_path: Path,
    results_path: Path,
    data_path: Path,
    valid_path: Path | None = None,
    model_type: str = "diffusion_buffer",
    dataset_type: int = 1,
    device_ids: tuple[int, ...] = (0,),
    num_workers: int | None = None,
    metrics: tuple[str, ...] | None = None,
    metric_for_scheduler: str | None = None,
    start_check_point: Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    max_steps: int | None = None,
    skip_doctor: bool = False,
    log_shapes: bool = False,
    log_stats: int = 0,
    on_nonfinite: Literal["stop", "skip"] | None = None,
    find_batch_size: bool = False,
    overrides: Overrides = (),
) -> None:
    """Train a model.

    Args:
        config_path: YAML config of the experiment.
        results_path: folder for checkpoints, logs and the model.
        data_path: training data.
        valid_path: validation data; without it nothing is validated.
        model_type: diffusion_buffer, the only one.
        dataset_type: 1 sample_*/{mixture,vocals}.wav; 2 clean/ and noisy/; 3 speech/ and noise/,
            mixed on the fly.
        device_ids: one GPU; for several start with torchrun. Without a GPU the CPU is used.
        num_workers: processes that read files (training.num_workers).
        metrics: scores of the validation: si_sdr sdr pesq estoi (training.metrics).
        metric_for_scheduler: the one that counts (training.metric_for_scheduler).
        start_check_point: a checkpoint file or model folder to take the first weights from.
        resume: go on with the run in results_path.
        seed: training.seed.
        max_steps: optimizer steps at most (training.num_steps).
        skip_doctor: start without looking at machine, data and config first.
        log_shapes: print shapes, types, devices and ranges of the first batch.
        log_stats: print the numbers of every stage each so many steps, and send them to
            TensorBoard; 0: never.
        on_nonfinite: stop at a NaN or Inf loss or gradient, or skip its batch
            (training.on_nonfinite).
        find_batch_size: train with the largest batch that fits into the memory, instead of
            training.batch_size.
        overrides: config keys.
    """
    from diffbuf_lib.data import open_dataset
    from diffbuf_lib.training import train

    if model_type != "diffusion_buffer":
        raise ConfigError(f"--model_type {model_type} is unknown: diffusion_buffer is the only one")
    if len(device_ids) > 1:
        raise ConfigError(
            f"--device_ids names {len(device_ids)} GPUs, and one process drives one: start "
            f"torchrun --nproc_per_node {len(device_ids)} train.py ... without --device_ids"
        )
    flags = {
        "num_workers": num_workers,
        "metrics": list(metrics) if metrics else None,
        "metric_for_scheduler": metric_for_scheduler,
        "seed": seed,
        "num_steps": max_steps,
        "on_nonfinite": on_nonfinite,
    }
    given = [f"training.{key}={value}" for key, value in flags.items() if value is not None]
    cfg = load_config(config_path, [*given, *overrides])
    train_set = open_dataset(dataset_type, data_path, cfg, training=True)
    valid_set = open_dataset(dataset_type, valid_path, cfg, training=False) if valid_path else None

    print(f"{len(train_set)} training clips, {len(valid_set) if valid_set else 0} validation clips")
    device = f"cuda:{device_ids[0]}" if device_ids else "auto"
    if find_batch_size:
        cfg = _with_batch_size(cfg, train_set, device, results_path if resume else None)
    main_process = os.environ.get("RANK", "0") == "0"  # torchrun numbers its processes
    if main_process and not skip_doctor:
        _consult_doctor(cfg, train_set, valid_set, device, results_path)
    recorder, model = None, None
    if main_process and (log_shapes or log_stats > 0):
        from diffbuf_lib.diagnostics.watch import RecordingModel, StageRecorder

        board = results_path / "tensorboard" / "stats"
        recorder = StageRecorder(
            cfg, say, shapes=log_shapes, every=log_stats, board=board, resumed=resume
        )
        model = RecordingModel(cfg, recorder)
    records = train(
        cfg,
        train_set,
        valid_set,
        results_path,
        resume=resume,
        start_check_point=start_check_point,
        device=device,
        progress=True,
        model=model,
    )
    try:
        with closing(records):
            for record in records:
                if recorder is not None:
                    recorder.step(record.step)
                if record.valid:
                    say(f"step {record.step}  epoch {record.epoch}  {_scores(record.valid)}")
    except KeyboardInterrupt:
        say(f"stopped; the same command with --resume goes on from {results_path}")
        raise
    finally:
        if recorder is not None:
            recorder.close()
    say(f"model: {results_path / 'model'}")


def doctor_command(
    config_path: Path,
    data_path: Path,
    valid_path: Path | None = None,
    dataset_type: int = 1,
    results_path: Path | None = None,
    device: str = "auto",
    json: bool = False,
    overrides: Overrides = (),
) -> None:
    """Look at machine, data, config and model before training; exit status 1 on an error.

    Args:
        config_path: YAML config of the experiment.
        data_path: training data.
        valid_path: validation data.
        dataset_type: as in train.
        results_path: where the run will write; default: the current folder's disk is looked at.
        device: auto, cpu, cuda or cuda:N.
        json: print JSON for machines.
        overrides: config keys.
    """
    import shutil

    from diffbuf_lib.diagnostics.doctor import examine_paths, has_error
    from diffbuf_lib.diagnostics.findings import render, to_json

    findings = examine_paths(
        config_path, data_path, valid_path, dataset_type=dataset_type, overrides=overrides,
        device=device, results_path=results_path,
    )  # fmt: skip
    if json:
        print(to_json(findings))
    else:
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(render(findings, colour=colour, width=width))
    if has_error(findings):
        sys.exit(1)


def replay_command(capsule_dir: Positional[Path], device: str = "cpu") -> None:
    """Make a failed training step again, module by module to the first bad value.

    Exit status 0 if it fails at the same place as then, 1 if not.

    Args:
        capsule_dir: a capsule_<step> folder, which training wrote into its results folder.
        device: cpu, cuda or cuda:N.
    """
    from diffbuf_lib.diagnostics.capsule import Capsule

    capsule = Capsule.load(capsule_dir)
    record = capsule.record
    print(f"{capsule_dir}: step {record.step} (epoch {record.epoch}) on {record.device}")
    print(record.error.get("message", ""))
    result = capsule.replay(device)
    print(result)
    if not result.reproduced:
        sys.exit(1)


def _with_batch_size(cfg: Config, train_set: Any, device: str, resumed: Path | None) -> Config:
    """Return the config with the largest batch that fits; a resumed run keeps the one it has."""
    from diffbuf_lib.training.memory import find_batch_size

    if resumed is not None and (resumed / "config.yaml").is_file():
        size = load_config(resumed / "config.yaml").training.batch_size
        say(f"batch_size {size}, which the resumed run began with")
    else:
        size = find_batch_size(cfg, train_set, device)
        say(f"batch_size {size} fits (training.batch_size was {cfg.training.batch_size})")
    return cfg.override(f"training.batch_size={size}")


def _consult_doctor(
    cfg: Config, train_set: Any, valid_set: Any, device: str, results_path: Path
) -> None:
    """Print warnings and errors, a line each; stop on an error."""
    from diffbuf_lib.diagnostics.doctor import examine, has_error

    findings = examine(cfg, train_set, valid_set, device=device, results_path=results_path)
    for finding in findings:
        if finding.severity in ("error", "warning"):
            print(f"doctor: {finding.line()}", file=sys.stderr)
    if has_error(findings):
        print("doctor: not started; --skip_doctor starts all the same", file=sys.stderr)
        sys.exit(1)


def _scores(valid: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in valid.items() if not k.endswith("_clips"))
