"""Find a trained model by whatever a user calls it: a folder, a run, or a name."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError

from diffbuf_lib.errors import ConfigError
from diffbuf_lib.model import DiffusionBufferModel

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(
    source: str | Path, device: str = "auto", overrides: Sequence[str] = ()
) -> DiffusionBufferModel:
    """Load a trained model for use.

    Args:
        source: a folder that `save_pretrained` wrote, a run's folder (its model/ is taken), or a
            name such as diffbuf/cpu-demo, which comes with the package.
        device: auto, cpu, cuda or cuda:N.
        overrides: `key.path=value` that change its config but not its weights, such as
            diffusion_buffer.buffer_size=10.

    Raises:
        ConfigError: no such model, or an override that its config refuses.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    location = _location(source)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # huggingface_hub prints
            model = DiffusionBufferModel.from_pretrained(location)
    except (OSError, HFValidationError) as error:  # what the hub raises, offline too, is an OSError
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--model {source} is no folder here and could not be fetched as a name ({reason}): "
            "give a folder that training wrote, such as results/demo/model"
        ) from error
    if overrides:
        changed = DiffusionBufferModel(model.cfg.override(*overrides))
        changed.load_state_dict(model.state_dict())
        model = changed
    return model.to(device).eval()


def fingerprint(model: DiffusionBufferModel) -> str:
    """Return 16 hexadecimal digits of the config and every weight: equal models have equal ones."""
    digest = hashlib.sha256(model.cfg.to_yaml().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _location(source: str | Path) -> str | Path:
    """Return the folder of a model, or the name of one that is not a folder here."""
    folder = Path(source)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if not folder.exists() and _HUB_NAME.fullmatch(str(source)):
        return str(source)
    raise ConfigError(
        f"--model {source} holds no trained model: give a folder that training wrote, such as "
        "results/demo/model, or a name such as diffbuf/cpu-demo"
    )
