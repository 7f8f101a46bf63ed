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
TRAIN = Path(diffbuf_lib.__file__).parents[1] / "train.py"


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
    command = [*start, "train.py", "--config_path", str(config_path)]
    command += ["--results_path", str(results_path), "--data_path", str(data_path)]
    if valid_path is not None:
        command += ["--valid_path", str(valid_path)]
    command += ["--dataset_type", str(dataset_type)]
    return [*command, *(part for each in overrides for part in ("--set", each)), *flags]


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
    """Run a launch command to its end, on the CPU, with this Python; return what it printed.

    Args:
        command: from `launch_command`.
        root: relative paths start there.
        timeout: seconds.

    Raises:
        ConfigError: it failed; holds its last lines.
        subprocess.TimeoutExpired: it took too long, and was ended.
    """
    torchrun = ["-m", "torch.distributed.run"] if command[0] == "torchrun" else []
    arguments = [str(TRAIN) if part == "train.py" else part for part in command[1:]]
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, *torchrun, *arguments], cwd=root, env=environment, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"exit status {done.returncode}: {done.stdout[-1500:]}")
    return done.stdout
