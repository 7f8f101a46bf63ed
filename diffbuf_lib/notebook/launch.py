"""The command that starts a run: on one process, on several, on several machines."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffbuf_lib
from diffbuf_lib.cli import parse
from diffbuf_lib.commands import Train
from diffbuf_lib.errors import ConfigError

PORT = 29500  # torchrun's own choice


def launch_command(
    config_path: str | Path,
    results_path: str | Path,
    data_path: str | Path,
    valid_path: str | Path | None = None,
    *,
    dataset_type: int = 1,
    processes: int = 1,
    nodes: int = 1,
    host: str = "",
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> list[str]:
    """Return the arguments of a training run, for several processes with torchrun before them.

    Args:
        config_path: YAML config.
        results_path: folder of the run; on several machines one that all of them see.
        data_path: training clips.
        valid_path: validation clips, or None.
        dataset_type: 1, 2 or 3.
        processes: on each machine, one for each of its GPUs.
        nodes: machines; the same command is typed on every one.
        host: of several machines the one where they meet, such as gpu1 or gpu1:29500.
        overrides: `key.path=value`.
        flags: more of train.py's arguments, such as --resume.

    Raises:
        ConfigError: no process, or several machines and no host.
    """
    if processes < 1 or nodes < 1:
        raise ConfigError(f"{processes} processes on {nodes} machines: give at least 1 of each")
    if nodes > 1 and not host:
        raise ConfigError(f"{nodes} machines have to meet somewhere: give the host of one of them")
    start = ["python"]
    if nodes > 1:
        place = host if ":" in host else f"{host}:{PORT}"
        start = ["torchrun", "--nnodes", str(nodes), "--nproc_per_node", str(processes)]
        start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", place]
    elif processes > 1:
        start = ["torchrun", "--standalone", "--nproc_per_node", str(processes)]
    paths = {"config_path": config_path, "results_path": results_path, "data_path": data_path}
    if valid_path is not None:
        paths["valid_path"] = valid_path
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    changes = [part for override in overrides for part in ("--set", override)]
    return [
        *start, "train.py", *arguments, "--dataset_type", str(dataset_type), *changes, *flags
    ]  # fmt: skip


def shell_line(command: Sequence[str]) -> str:
    """Return a command as it is typed: what starts it, then train.py, then an option a line."""
    script = list(command).index("train.py")
    lines = [[*command[:script]], [command[script]]]
    for part in command[script + 1 :]:
        if part.startswith("--"):
            lines.append([])
        lines[-1].append(part)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def parse_command(command: Sequence[str]) -> dict[str, Any]:
    """Read a command as train.py does, without starting anything.

    Args:
        command: from `launch_command`.

    Returns:
        The fields of `commands.Train` by name.

    Raises:
        ConfigError: train.py would refuse it; says why.
    """
    said = io.StringIO()
    own = list(command)[list(command).index("train.py") + 1 :]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return vars(parse(Train, own, "train.py"))
    except SystemExit:
        reason = " ".join(said.getvalue().split())
        raise ConfigError(f"train.py refuses {shlex.join(own)}: {reason}") from None


def run_on_cpu(command: Sequence[str], root: Path, *, timeout: float = 110) -> str:
    """Run a launch command to its end, on the CPU, with this Python.

    Args:
        command: from `launch_command`.
        root: relative paths start there.
        timeout: seconds.

    Returns:
        What it printed.

    Raises:
        ConfigError: it failed; holds its last lines.
        subprocess.TimeoutExpired: it took too long, and was ended.
    """
    start = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    script = str(Path(diffbuf_lib.__file__).parents[1] / "train.py")
    arguments = [script if part == "train.py" else part for part in command[1:]]
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [*start[command[0]], *arguments], cwd=root, env=environment, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"exit status {done.returncode}: {done.stdout[-1500:]}")
    return done.stdout
