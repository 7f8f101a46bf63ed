"""The doctor's look at the machine: versions, devices, memory, disk, determinism."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from diffbuf_lib.config import Config
from diffbuf_lib.diagnostics.findings import Finding
from diffbuf_lib.training.memory import free_memory

GIB = 2**30
_LITTLE_DISK = 2 * GIB  # checkpoints, logs and a model of a large run


def check_machine(cfg: Config, device: str, results_path: Path | None) -> Iterator[Finding]:
    """Look at what training would run on.

    Args:
        cfg: the config.
        device: as asked for: "auto", "cpu", "cuda" or "cuda:N".
        results_path: where the run will write; None: the current folder.
    """
    yield from _versions()
    yield from _device(cfg, device)
    yield from _disk(results_path or Path.cwd())
    yield from _determinism(cfg, resolve_device(device))


def resolve_device(device: str) -> torch.device:
    """Return the device that training takes for a `--device`: without a GPU the CPU."""
    known = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if known is None or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(known.group(1) or 0))


def _versions() -> Iterator[Finding]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchaudio", "accelerate", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding("info", "machine.versions", text, value=versions)
    pair = [versions[name].partition("+")[0] for name in ("torch", "torchaudio")]
    same = pair[0].split(".")[:2] == pair[1].split(".")[:2]
    if same:
        yield Finding(
            "ok", "machine.torch_pair", f"torch and torchaudio are a pair ({pair[0]})", value=pair
        )
        return
    yield Finding(
        "warning",
        "machine.torch_pair",
        f"torch {pair[0]} and torchaudio {pair[1]} are not of one release",
        value=pair,
        limit="the same major.minor",
        why="torchaudio's compiled library is linked against one torch release and does not load "
        "beside another: `diffbuf data download` would fail",
        fix=f"install torchaudio=={'.'.join(pair[0].split('.')[:2])}.*",
    )


def _device(cfg: Config, device: str) -> Iterator[Finding]:
    training = cfg.training
    chosen = resolve_device(device)
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is None:
        yield Finding(
            "error",
            "machine.device",
            f"device {device!r} is unknown",
            value=device,
            limit="auto, cpu, cuda, cuda:N",
            why="training refuses it",
            fix="give --device auto, cpu, cuda or cuda:N",
        )
        return
    if chosen.type == "cuda":
        index = chosen.index or 0
        if index >= torch.cuda.device_count():
            yield Finding(
                "error",
                "machine.device",
                f"GPU {index} does not exist: this machine has {torch.cuda.device_count()}",
                value=index,
                limit=torch.cuda.device_count() - 1,
                why="training refuses it",
                fix="lower the number in --device_ids (or --device)",
            )
            return
        free = free_memory(chosen) / GIB
        yield Finding(
            "ok",
            "machine.device",
            f"{torch.cuda.get_device_name(index)}, {free:.1f} GiB of its memory free",
            value=str(chosen),
        )
    else:
        yield Finding(
            "info",
            "machine.device",
            f"no GPU is used: {torch.get_num_threads()} CPU threads, "
            f"{free_memory(chosen) / GIB:.1f} GiB free",
            value="cpu",
        )
        if training.use_amp and training.amp_dtype == "fp16":
            yield Finding(
                "info",
                "machine.precision",
                "training.use_amp with fp16 needs a GPU: this machine trains in float32",
                value="float32",
                limit="fp16",
                config_key="training.use_amp",
                overrides=("training.use_amp=false",),
            )


def _disk(path: Path) -> Iterator[Finding]:
    here = path.absolute()
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        yield Finding(
            "error",
            "machine.results",
            f"results folder {path} cannot be written",
            value=str(here),
            why="training could not save a checkpoint",
            fix="choose another --results_path, or change the folder's permissions",
        )
    elif free < _LITTLE_DISK:
        yield Finding(
            "warning",
            "machine.disk",
            f"{free / GIB:.2f} GiB are free in {here}",
            value=free,
            limit=_LITTLE_DISK,
            why="checkpoints hold weights, averaged weights and optimizer state, last and best",
            fix="free disk space, or choose another --results_path",
        )
    else:
        yield Finding("ok", "machine.disk", f"{free / GIB:.0f} GiB are free in {here}", value=free)


def _determinism(cfg: Config, device: torch.device) -> Iterator[Finding]:
    wanted = cfg.training.deterministic
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if wanted and device.type == "cuda" and workspace not in (None, ":4096:8", ":16:8"):
        yield Finding(
            "error",
            "machine.deterministic",
            f"CUBLAS_WORKSPACE_CONFIG is {workspace!r} and training.deterministic is true",
            value=workspace,
            limit=":4096:8 or :16:8",
            why="torch then refuses matrix products",
            fix="unset CUBLAS_WORKSPACE_CONFIG, or set training.deterministic=false",
            config_key="training.deterministic",
            overrides=("training.deterministic=false",),
        )
    else:
        where = "on this CPU" if device.type == "cpu" else "on this GPU model"
        text = f"the same bits at every run {where}" if wanted else "runs may differ in last bits"
        yield Finding(
            "info",
            "machine.deterministic",
            f"training.deterministic is {str(wanted).lower()}: {text} (Python "
            f"{sys.version_info.major}.{sys.version_info.minor}, seed {cfg.training.seed})",
            value=wanted,
            config_key="training.deterministic",
        )
