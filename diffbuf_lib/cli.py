"""Entry points of `diffbuf ...` and `python train.py ...`; the commands are in `commands`.

Nothing heavier than pydantic is imported before the command line is parsed, so that help and
errors about flags appear at once.
"""

from __future__ import annotations

import faulthandler
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from diffbuf_lib.commands import COMMANDS, Train
from diffbuf_lib.errors import ConfigError, DiffbufError

Command = TypeVar("Command")


def main(args: Sequence[str] | None = None) -> None:
    """Run `diffbuf ...`."""
    given = list(sys.argv[1:] if args is None else args)
    run(lambda: _dispatch(given))


def train_main() -> None:
    """Run `python train.py ...`."""
    run(lambda: parse(Train, sys.argv[1:], "train.py")())


def run(command: Callable[[], Any]) -> None:
    """Run a command; our errors print one line and exit with status 2, Ctrl-C with 130."""
    faulthandler.enable()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):  # the terminal may not encode all file names
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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


def parse(command: type[Command], args: Sequence[str], prog: str) -> Command:
    """Parse the flags of a command; `--set a=1 b=2` means `--set a=1 --set b=2`."""
    spread: list[str] = []
    setting = False
    for part in args:
        for flag, instead in getattr(command, "instead", {}).items():
            if re.fullmatch(flag, part):
                raise ConfigError(f"{part} is not supported: {instead}")
        if part in ("--data_path", "--valid_path", "--train_path") and part in spread:
            raise ConfigError(f"{part} is given twice: list all paths after one {part}")
        if part.startswith("-"):
            setting = part == "--set" or part.startswith("--set=")
        elif setting and "=" in part and spread[-1] != "--set":
            spread.append("--set")
        spread.append(part)
    return tyro.cli(command, args=spread, prog=prog, use_underscores=True)


def _dispatch(args: list[str]) -> None:
    """Find the command that `args` begin with, and run it."""
    words = 2 if args[:1] == ["data"] or " ".join(args[:2]) in COMMANDS else 1  # `data build`
    name = " ".join(args[:words]).replace("_", "-")
    if name not in COMMANDS and {"-h", "--help"} & set(args[:words]):
        print("usage: diffbuf COMMAND ...; diffbuf COMMAND --help describes its flags\n")
        for entry in COMMANDS.values():
            print(f"  {entry.name:14}  {entry.target.__doc__.splitlines()[0]}")
        return
    parse(COMMANDS[name].load(), args[words:], f"diffbuf {name}")()


if __name__ == "__main__":  # as torchrun starts it
    main()
