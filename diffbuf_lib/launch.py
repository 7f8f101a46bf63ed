"""Job files for schedulers: Slurm, SkyPilot, or torchrun on your own machines.

Only a short, readable file is written; the scheduler queues, starts and restarts the job.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import UseAppendAction

from diffbuf_lib.config import load_config
from diffbuf_lib.errors import ConfigError

Kind = Literal["slurm", "skypilot", "torchrun"]
_FILES = {"slurm": "slurm.sh", "skypilot": "skypilot.yaml", "torchrun": "torchrun.sh"}
_SUBMIT = {"slurm": "sbatch", "skypilot": "sky jobs launch --yes", "torchrun": "bash"}
# What may stand unquoted in a job file: no spaces, quotes or newlines.
_PLAIN = re.compile(r"[\w@%+=:,./-]+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job asks for."""

    valid_path: tuple[str, ...] = ()  # validation data, as in train
    nodes: str = "1"  # machines; torchrun: also from:to, such as 1:4, as many as are available
    gpus: int = 1  # per machine; 0 trains on CPUs
    processes: int | None = None  # per machine; default: one per GPU
    time: str = "24:00:00"  # time limit of a Slurm job; the run continues in the next one
    margin: int = 120  # seconds before the time limit at which the run is asked to stop
    accelerator: str = "H100"  # SkyPilot's name of the GPU
    restarts: int = 3  # restarts of the processes at most, when one of them dies
    options: UseAppendAction[tuple[str, ...]] = ()  # #SBATCH lines: --options=--partition=gpu
    env: UseAppendAction[tuple[str, ...]] = ()  # environment of the job, NAME=VALUE


def write_job(
    kind: Kind,
    config_path: str | Path,
    data_path: str | Path | Sequence[str | Path],
    results_path: str | Path,
    *,
    train: Sequence[str] = (),  # further flags of `diffbuf train`
    overrides: Sequence[str] = (),  # config keys
    **asked: Any,  # the fields of `Request`
) -> Path:
    """Write a job that trains, and resumes where it stopped, into the results folder.

    Raises ConfigError for a config that cannot be read, or a value that no job file can hold.
    """
    job, results_path = Request(**asked), Path(results_path)
    load_config(config_path, overrides)
    for name, value, pattern in (
        ("nodes", job.nodes, r"[1-9]\d*(:[1-9]\d*)?" if kind == "torchrun" else r"[1-9]\d*"),
        ("time", job.time, r"(\d+-)?\d+(:\d+){0,2}"),
        ("gpus", str(job.gpus), r"\d+"),
        ("accelerator", job.accelerator, _PLAIN.pattern),
        *(("env", value, r"\w+=[^\n]*") for value in job.env),
        *(("options", value, r"-[^\n]+") for value in job.options),
    ):
        if not re.fullmatch(pattern, value):
            raise ConfigError(f"--{name} {value!r:.80} is not valid in a {kind} job")
    # A machine that SkyPilot starts has a copy of this folder, and nothing else from here.
    data = [data_path] if isinstance(data_path, str | Path) else data_path
    flags: dict[str, Sequence[Any]] = {"config_path": [config_path], "results_path": [results_path]}
    flags |= {"data_path": data, "valid_path": job.valid_path}
    words = ["-m", "diffbuf_lib.cli", "train", "--resume_if_any"]
    for flag, values in flags.items():
        words += [f"--{flag}"] if values else []
        for path in map(str, values):
            words.append(path if kind == "skypilot" or "://" in path else str(Path(path).resolve()))
    words += [*train, *(word for override in overrides for word in ("--set", override))]
    results_path.mkdir(parents=True, exist_ok=True)
    file = results_path / _FILES[kind]
    name = re.sub(r"\W+", "-", f"diffbuf-{results_path.name}")
    text = _template(f"{_FILES[kind]}.jinja").render(
        vars(job), name=name, processes=job.processes or max(job.gpus, 1),
        env=[variable.partition("=")[::2] for variable in job.env],
        log=shlex.quote(str((results_path / "job.log").resolve())), file=shlex.quote(str(file)),
        python=shlex.quote(sys.executable), train=shlex.join(words),
    )  # fmt: skip
    file.write_text(text, encoding="utf-8")
    return file


def _template(name: str) -> Any:
    import jinja2  # here, since the command line imports this module at every start

    jobs = jinja2.Environment(
        loader=jinja2.PackageLoader("diffbuf_lib"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    jobs.filters["quote"] = shlex.quote
    return jobs.get_template(name)


def submit(kind: Kind, job: Path) -> None:
    """Hand a job to `sbatch`, `sky jobs launch` or `bash`; raises ConfigError if that fails."""
    command = [*_SUBMIT[kind].split(), str(job)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"`{shlex.join(command)}` failed: {error}") from error
