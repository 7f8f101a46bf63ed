"""The command line: `diffbuf train|enhance|stream|evaluate|doctor|replay|...`, and train.py."""

from __future__ import annotations

import faulthandler
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from diffbuf_lib.commands.audio import (
    demo_command,
    demo_model_command,
    enhance_command,
    stream_command,
)
from diffbuf_lib.commands.data import DATA_COMMANDS, config_command, data_command
from diffbuf_lib.commands.evaluation import compare_command, evaluate_command, sweep_command
from diffbuf_lib.commands.training import doctor_command, replay_command, train_command
from diffbuf_lib.errors import DiffbufError


def main(args: Sequence[str] | None = None) -> None:
    """Run `diffbuf ...`."""
    data = tyro.extras.SubcommandApp()
    for name, function in DATA_COMMANDS.items():
        data.command(name=name)(function)
    commands: dict[str, Callable[..., None]] = {
        "doctor": doctor_command,
        "train": train_command,
        "replay": replay_command,
        "enhance": enhance_command,
        "stream": stream_command,
        "evaluate": evaluate_command,
        "compare": compare_command,
        "sweep": sweep_command,
        "demo": demo_command,
        "demo-model": demo_model_command,
        "config": config_command,
    }
    argv = list(sys.argv[1:] if args is None else args)
    if argv[:1] == ["data"] and argv[1:]:
        run(lambda: data.cli(args=argv[1:], prog="diffbuf data", use_underscores=True))
        return
    app = tyro.extras.SubcommandApp()
    for name, function in commands.items():
        app.command(name=name)(function)
    app.command(name="data")(data_command)
    run(lambda: app.cli(args=argv, prog="diffbuf", use_underscores=True))


def train_main() -> None:
    """Run `python train.py ...`."""
    run(lambda: tyro.cli(train_command, prog="train.py", use_underscores=True))


def run(command: Callable[[], Any]) -> None:
    """Run a command; errors of ours are one line and exit status 2, Ctrl-C is 130."""
    faulthandler.enable()
    warnings.showwarning = _show_warning
    try:
        command()
    except DiffbufError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: Any = None, line: str | None = None,
) -> None:  # fmt: skip
    print(f"warning: {message}", file=sys.stderr)
