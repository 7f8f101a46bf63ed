"""Checkpoint files: written whole or not at all, read without running what is in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from diffbuf_lib.data.audio import atomic_file
from diffbuf_lib.errors import CheckpointError

FORMAT = 1
"""Raised when a checkpoint's content changes so that an older library cannot read it."""

KEYS = frozenset(
    {"format", "version", "config", "step", "epoch", "examples", "processes", "pending", "best"}
    | {"bad_validations", "bad_batches", "model", "ema", "optimizer", "scheduler", "scaler"}
)
"""What a checkpoint holds. No state of random generators: all draws are keyed (see feed.py)."""


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that, whenever the machine stops, `path` is the old or the new one.

    Args:
        path: the file; its folder is made if needed.
        state: tensors and plain values, with the names in `KEYS` except "format".

    Raises:
        CheckpointError: it cannot be written (disk full, no permission). An older file at `path`
            is still there and whole.
    """
    with replaced_file(Path(path)) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running what is in it.

    Raises:
        CheckpointError: no such file, cut short or damaged, not a checkpoint of this library, or
            one that holds more than tensors and plain values.
    """
    path = Path(path)
    state = load_tensors(path, "checkpoint")
    if not isinstance(state, dict) or not KEYS.issubset(state):
        raise CheckpointError(
            f"{path} is not a training checkpoint of diffbuf: take checkpoints/last.pt or best.pt "
            "of a results folder"
        )
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state['format']}, written by diffbuf "
            f"{state['version']}; this library reads format {FORMAT}: install that version"
        )
    return state


def load_tensors(path: Path, what: str) -> Any:
    """Read what `torch.save` wrote onto the CPU: tensors and plain values only (`weights_only`).

    Args:
        path: the file.
        what: what error messages call it.

    Raises:
        CheckpointError: no such file, a damaged one, or one that would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{what} {path} does not exist: check the path")
    try:
        with zipfile.ZipFile(path) as archive:  # torch's reader does not look at checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{what} {path} is refused: it holds more than tensors and plain values, and "
            "reading it could run code; take a file that diffbuf has written"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{what} {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever the zip and pickle readers meet in damaged bytes
        raise CheckpointError(
            f"{what} {path} is damaged or cut short: take another one, such as best.pt "
            f"({type(error).__name__})"
        ) from error


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read only the model's weights, averaged ones (EMA) where there are.

    Args:
        path: a checkpoint file, or a folder that `save_pretrained` has written.

    Raises:
        CheckpointError: as in `load_checkpoint`, or a folder without model.safetensors.
    """
    path = Path(path)
    if not path.is_dir():
        state = load_checkpoint(path)
        prefix = "module."  # AveragedModel holds the averaged copy under this name
        averaged = {
            name.removeprefix(prefix): value
            for name, value in (state["ema"] or {}).items()
            if name.startswith(prefix)
        }
        return averaged or state["model"]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"folder {path} holds no model.safetensors: give a checkpoint file or the model/ "
            "folder of a results folder"
        )
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights {file} are damaged: {error}") from error


def apply_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: Path) -> None:
    """Put weights into a model of the same architecture.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; names the first.
    """
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    given = {name: list(value.shape) for name, value in weights.items()}
    for name in {**own, **given}:
        if name not in given:
            problem = f"it has no {name}, which is {own[name]} in this model"
        elif name not in own:
            problem = f"its {name}, {given[name]}, is not in this model"
        elif own[name] != given[name]:
            problem = f"its {name} is {given[name]}, in this model {own[name]}"
        else:
            continue
        raise CheckpointError(f"weights of {source} do not fit: {problem}; make `model` equal")
    model.load_state_dict(dict(weights))


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` once it is safely on the disk.

    Raises:
        CheckpointError: it cannot be written; `path` is as before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch's zip writer turns some OSErrors into these
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """Return what to raise for a file or folder that cannot be written."""
    cause = error if isinstance(error, OSError) else error.__context__
    reason = cause.strerror if isinstance(cause, OSError) else None
    return CheckpointError(
        f"{path} cannot be written ({reason or error}): free space or choose another "
        "--results_path; what was there before is untouched"
    )
