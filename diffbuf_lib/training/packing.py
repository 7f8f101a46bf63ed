"""Trees of tensors and plain values as safetensors and JSON: readable without running anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffbuf_lib.errors import CheckpointError


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, each with memory of its own, as safetensors.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read what `save_tensors` wrote, onto the CPU.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read: {reason}; copy the folder again") from error


def save_json(path: Path, value: Any) -> None:
    """Write plain values as JSON; a number that JSON lacks becomes "nan", "inf" or "-inf".

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(_plain(value), indent=1, allow_nan=False), encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: no such file, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} cannot be read: {reason}; copy the folder again") from error


def pack(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take a tree apart into JSON and named tensors; `unpack` puts it together again.

    Args:
        tree: dicts (of any plain keys), lists, tuples, tensors and plain values.

    Returns:
        The tree in JSON's types, in which {"tensor": name} stands for a tensor, and the tensors.
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, torch.Tensor):
            tensors[name] = node
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[key, walk(item, f"{name}/{key}")] for key, item in node.items()]}
        if isinstance(node, list | tuple):
            kind = "list" if isinstance(node, list) else "tuple"
            return {kind: [walk(item, f"{name}/{i}") for i, item in enumerate(node)]}
        if isinstance(node, float) and not math.isfinite(node):
            return {"float": str(node)}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"{name} is a {type(node).__name__}, which JSON cannot hold")

    return walk(tree, ""), tensors


def unpack(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Undo `pack`.

    Raises:
        CheckpointError: the two do not fit each other, or are not what `pack` gives.
    """
    if not isinstance(node, dict):
        return node
    try:
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {key: unpack(item, tensors) for key, item in value}
        if kind in ("list", "tuple"):
            items = [unpack(item, tensors) for item in value]
            return items if kind == "list" else tuple(items)
        if kind == "float":
            return float(value)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the packed state is damaged at {str(node)[:80]}") from error
    raise CheckpointError(f"the packed state holds an unknown {kind!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
