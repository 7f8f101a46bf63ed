"""What several commands share."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import UseAppendAction, arg

Overrides = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(name="set", metavar="KEY.PATH=VALUE", help="change a config key; may be repeated"),
]


def say(line: str) -> None:
    """Print a line above a progress bar."""
    from tqdm import tqdm

    tqdm.write(line)
