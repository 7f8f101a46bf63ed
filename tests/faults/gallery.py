"""The list of faults, and the README that is made of it: `python -m tests.faults.gallery`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).with_name("README.md")
INTRO = """# The failure gallery

Every failure of this table is provoked for real by `test_gallery.py`, which checks the words in
the last column. The table is made from the tests: `python -m tests.faults.gallery`.

Around it: `test_capsule.py` (what a failed step leaves behind and how it is replayed),
`test_recovery.py` (skipped batches, memory, dead readers, the lock), `test_kills.py` (SIGKILL at
random moments; 4 in `make test`, 40 in `make test-long`), and `tests/fuzz/`.

| failure | provoked by | error | the message says |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Args:
        name: the failure.
        how: how the test provokes it.
        error: class of the exception.
        says: words that the message must hold.
        provoke: takes an empty folder; returns the exception.
    """

    name: str
    how: str
    error: str
    says: str
    provoke: Callable[[Path], BaseException]


FAULTS: list[Fault] = []


def fault(
    name: str, how: str, error: str, says: str
) -> Callable[[Callable[[Path], BaseException]], Callable[[Path], BaseException]]:
    """Add a function that provokes a failure to the gallery."""

    def add(provoke: Callable[[Path], BaseException]) -> Callable[[Path], BaseException]:
        FAULTS.append(Fault(name, how, error, says, provoke))
        return provoke

    return add


def table() -> str:
    """Return the README."""
    from tests.faults import test_gallery  # noqa: F401 (fills FAULTS)

    rows = (f"| {f.name} | {f.how} | {f.error} | {f.says} |\n" for f in FAULTS)
    return INTRO + "".join(row.replace("||", "\\|\\|") for row in rows)


if __name__ == "__main__":
    from tests.faults import gallery  # the one that test_gallery fills, not __main__

    README.write_text(gallery.table(), encoding="utf-8")
