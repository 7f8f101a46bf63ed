"""Checkpoint files: written whole or not at all, read without running what is in them."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from diffbuf_lib.errors import CheckpointError

FORMAT = 1
"""Raised when a checkpoint's content changes so that an older library cannot read it."""

KEYS = frozenset(
    {"format", "version", "config", "step", "epoch", "examples", "processes", "pending", "best"}
    | {"bad_validations"}
    | {"model", "ema", "optimizer", "scheduler", "scaler"}
)
"""What a checkpoint holds. No state of random generators: all draws are keyed (see plan.py)."""


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that, whenever the machine stops, `path` is the old or the new one.

    Args:
        path: the file; its folder is made if needed.
        state: tensors and plain values, with the names in `KEYS` except "format".

    Raises:
        CheckpointError: it cannot be written (disk full, no permission). An older file at `path`
            is still there and whole.
    """
    path = Path(path)
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Only tensors and plain values are read (`weights_only`): a file that would run code is refused.

    Raises:
        CheckpointError: no such file, cut short or damaged, not a checkpoint of this library, or
            one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: check the path")
    try:
        _check_whole(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is refused: it holds more than tensors and plain values, and "
            "reading it could run code; take a file that diffbuf has written"
        ) from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever the zip and pickle readers meet in damaged bytes
        raise CheckpointError(
            f"checkpoint {path} is damaged or cut short: take another one, such as best.pt "
            f"({type(error).__name__})"
        ) from error
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
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights:
            problem = f"it has no {name}, which is {list(value.shape)} in this model"
        elif weights[name].shape != value.shape:
            problem = (
                f"its {name} is {list(weights[name].shape)}, in this model {list(value.shape)}"
            )
        else:
            continue
        raise CheckpointError(f"weights of {source} do not fit: {problem}; make `model` equal")
    for name in weights:
        if name not in own:
            raise CheckpointError(
                f"weights of {source} do not fit: its {name}, {list(weights[name].shape)}, is not "
                "in this model; make `model` equal"
            )
    model.load_state_dict(dict(weights))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place once it is safely on the disk.

    Raises:
        CheckpointError: it cannot be written; the temporary file is gone, `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns some OSErrors into these
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else None
        raise CheckpointError(
            f"{path} cannot be written ({reason or error}): free space or choose another "
            "--results_path; what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk: without it a rename can be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_whole(path: Path) -> None:
    """Compare every member of the archive with its checksum; torch's reader does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)
