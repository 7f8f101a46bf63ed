"""The command that starts a run, on one process or on several."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from typing import Any

from diffbuf_lib.cli import parse
from diffbuf_lib.commands import Train
from diffbuf_lib.errors import ConfigError


def launch_command(
    config_path: str,
    results_path: str,
    data_path: str,
    valid_path: str,
    *,
    processes: int = 1,
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> list[str]:
    """Return the arguments of a training run, preceded by torchrun for several processes.

    `processes` is one for each GPU of the machine; `flags` are further arguments of train.py.
    """
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(torchrun if processes > 1 else ["python"]), "train.py"]
    command += ["--config_path", config_path, "--results_path", results_path]
    command += ["--data_path", data_path, "--valid_path", valid_path]
    return [*command, *(part for each in overrides for part in ("--set", each)), *flags]


def shell_line(command: Sequence[str]) -> str:
    """Return a command as it is typed: the launcher, then train.py, then one option per line."""
    script = list(command).index("train.py")
    lines = [[*command[:script]], [command[script]]]
    for part in command[script + 1 :]:
        if part.startswith("--"):
            lines.append([])
        lines[-1].append(part)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def parse_command(command: Sequence[str]) -> dict[str, Any]:
    """Read a command as train.py does, without starting anything; return its fields by name.

    Raises:
        ConfigError: train.py would refuse it; the message says why.
    """
    said = io.StringIO()
    own = list(command)[list(command).index("train.py") + 1 :]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return vars(parse(Train, own, "train.py"))
    except SystemExit:
        reason = " ".join(said.getvalue().split())
        raise ConfigError(f"train.py refuses {shlex.join(own)}: {reason}") from None
