"""Write a capsule: all that a failed step was made of, so that it can be replayed elsewhere.

capsule.json           what failed and where: error, traceback, finding, files, config, versions
batch.safetensors      per round: mix, target, the examples' generator states, and the draws t, z
state.safetensors      model, averaged model, optimizer, scheduler, scaler; state.json its tree
rng.safetensors        the global generators at the beginning of the step
trace.safetensors      the stages that the step reached

`diffbuf_lib.diagnostics.capsule` reads and replays it. Of a run's capsules the first and the two
newest are kept: the first failure is the most telling one, and a resumed run needs its newest.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffbuf_lib
from diffbuf_lib.config import Config
from diffbuf_lib.training.autopsy import Autopsy
from diffbuf_lib.training.feed import Batch
from diffbuf_lib.training.folder import sync_folder
from diffbuf_lib.training.packing import pack, save_json, save_tensors
from diffbuf_lib.training.step import Engine

FORMAT = 1
KEPT = 3


@dataclass(frozen=True)
class Scene:
    """The failed step.

    Args:
        cfg: the config.
        step: counted from 1.
        epoch: counted from 0.
        rank: which process this is.
        rounds: which batches of the epoch.
        batches: this process's, a list as long as `rounds`.
        names: of the examples' files, a list a round.
        rng: the global generators at the beginning of the step, from `global_states`.
    """

    cfg: Config
    step: int
    epoch: int
    rank: int
    rounds: Sequence[int]
    batches: Sequence[Batch]
    names: Sequence[Sequence[str]]
    rng: dict[str, Tensor]


def write_capsule(
    results: Path,
    scene: Scene,
    engine: Engine,
    autopsy: Autopsy,
    error: BaseException,
    note: str,
    scale: float | None,
) -> Path:
    """Write `results/capsule_<step>`, whole or not at all.

    Args:
        results: the results folder.
        scene: the step.
        engine: as it was before the step, or as the exception left it.
        autopsy: what is known of the failure.
        error: what the run will raise.
        note: whether the batch is finite in float32, or nothing.
        scale: of the gradient scaler in this step.

    Returns:
        The folder.

    Raises:
        Exception: whatever goes wrong, disk full included; nothing half-made is left.
    """
    suffix = f"_rank{scene.rank}" if scene.rank else ""
    folder = results / f"capsule_{scene.step}{suffix}"
    temporary = results / f".{folder.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tree, tensors = pack(engine.state_dict())
        save_tensors(temporary / "state.safetensors", tensors)
        save_json(temporary / "state.json", tree)
        save_tensors(temporary / "batch.safetensors", _batch_tensors(scene, autopsy))
        save_tensors(temporary / "rng.safetensors", scene.rng)
        save_tensors(temporary / "trace.safetensors", autopsy.trace)
        save_json(
            temporary / "capsule.json",
            _report(scene, engine, autopsy, error, note) | {"scale": scale},
        )
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync_folder(results)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(results, folder)
    return folder


def global_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's, numpy's and Python's global generators as tensors."""
    _, keys, position, _, _ = np.random.get_state()
    _, python, _ = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position], dtype=torch.int64),
        "python": torch.tensor(python, dtype=torch.int64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _batch_tensors(scene: Scene, autopsy: Autopsy) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(scene.batches):
        tensors[f"{i}/mix"], tensors[f"{i}/target"] = batch.mix, batch.target
        seeds = [g.initial_seed() for g in batch.generators]
        states = [
            torch.Generator(g.device).manual_seed(seed).get_state()
            for g, seed in zip(batch.generators, seeds, strict=True)
        ]
        tensors[f"{i}/generators"] = torch.stack(states)
    for i, draws in enumerate(autopsy.draws):
        tensors.update({f"{i}/{name}": value for name, value in draws.items()})
    return tensors


def _report(
    scene: Scene, engine: Engine, autopsy: Autopsy, error: BaseException, note: str
) -> dict[str, Any]:
    device = engine.accelerator.device
    cause = error.__cause__ or error
    return {
        "format": FORMAT,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "diffbuf": diffbuf_lib.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "step": scene.step,
        "epoch": scene.epoch,
        "rank": scene.rank,
        "rounds": list(scene.rounds),
        "files": [list(names) for names in scene.names],
        "error": {"type": type(cause).__name__, "message": str(error)},
        "finding": None if autopsy.finding is None else autopsy.finding.to_dict(),
        "bad_parameters": autopsy.bad_parameters,
        "losses": autopsy.losses,
        "grad_norm": autopsy.grad_norm,
        "float32": note,
        "visits": [asdict(visit) for visit in autopsy.visits],
        "model_class": type(engine.model).__name__,
        "lr": engine.lr,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": engine.accelerator.mixed_precision,
        "seeds": [[g.initial_seed() for g in batch.generators] for batch in scene.batches],
        "config": scene.cfg.to_dict(),
        "traceback": "".join(traceback.format_exception(cause)).splitlines(),
        "stacks": _stacks(),
    }


def _stacks() -> list[str]:
    """Return faulthandler's stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace").splitlines()


def _prune(results: Path, newest: Path) -> None:
    """Keep the first and the newest ones."""
    found = sorted(
        (path for path in results.glob("capsule_*") if path.is_dir() and path != newest),
        key=lambda path: path.stat().st_mtime_ns,
    )
    for path in found[1 : len(found) + 2 - KEPT]:
        shutil.rmtree(path, ignore_errors=True)
