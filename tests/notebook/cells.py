"""Runs a notebook's code cells in this process, where a test can reach into the library."""

from __future__ import annotations

import ast
import shutil
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from IPython.display import display

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/debug.yaml"
DEMO = ROOT / "data" / "DN-LM-demo"


class Failure(NamedTuple):
    """An assertion of a notebook that did not hold."""

    cell: str
    message: str


def copy_workspace(folder: Path) -> Path:
    """Copy notebooks and what they need to a folder, where they also write; return theirs."""
    for name in ("notebooks", "configs", "recipes"):
        ignored = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder / "notebooks"


def find(topic: str) -> Path:
    """The notebook that has a word such as "sigma" in its name."""
    (path,) = (ROOT / "notebooks").glob(f"[0-9][0-9]_*{topic}*.ipynb")
    return path


def first_failed_check(path: Path) -> Failure | None:
    """Run the cells in their order up to the first assertion of theirs that fails.

    Any other error, also an assertion inside the library, is raised: a reader would see a crash
    where a check should have spoken.
    """
    names: dict[str, Any] = {"__name__": "__main__", "display": display}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            try:
                _run(cell.source, f"<{cell.id}>", names)
            except AssertionError as error:
                if traceback.extract_tb(error.__traceback__)[-1].filename != f"<{cell.id}>":
                    raise
                return Failure(cell.id, str(error))
    return None


def _run(source: str, name: str, names: dict[str, Any]) -> None:
    """Run one cell, and show its last expression as Jupyter would, here as text."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, type_ignores=[]), name, "exec"), names)
    if last is not None:
        display(eval(compile(ast.Expression(last.value), name, "eval"), names))
