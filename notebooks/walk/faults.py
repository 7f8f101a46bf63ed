"""Breaking things on purpose: what a notebook needs to cause a failure and keep its message."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.training import StepRecord, train
from diffbuf_lib.training.feed import ClipSource
from walk.clips import FirstClips

# Overrides with which four steps of any config take a second.
SMALL = (
    "model={name: conv, base_channels: 16, num_layers: 2}",
    "sde={type: bbed, diffusion: {theta: 0.08, k: 2.6}}",
    "diffusion_buffer={buffer_size: 8, time_sampling: linspace, leading_zeros: false}",
    "training={loss: score, batch_size: 2, num_steps: 4, use_amp: false, num_workers: 0}",
)


def caught(action: Callable[[], object]) -> Exception:
    """Run something that should fail, and return its error; AssertionError if it does not fail."""
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing failed here: the fault was not caused")


def read(error: Exception, root: Path) -> str:
    """Return an error's class and message, wrapped to a page, with paths relative to `root`."""
    text = f"{type(error).__name__}: {error}".replace(f"{root}{os.sep}", "")
    return textwrap.fill(text, 96, break_long_words=False, break_on_hyphens=False)


def few_steps(
    cfg: Config, clips: ClipSource, folder: Path, *, resume: bool = False
) -> list[StepRecord]:
    """Train on the CPU, without validation, up to `training.num_steps`, in an emptied folder."""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    return list(train(cfg, clips, None, folder, resume=resume, device="cpu"))


class Mono(FirstClips):
    """Clips averaged to mono, so that clips with any number of channels can form a batch."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mix, target = super().__getitem__(index)
        return mix.mean(0, keepdim=True), target.mean(0, keepdim=True)


class Spoilt(Mono):
    """Mono clips; clip `bad` has a NaN in the middle of its mixture.

    Stands for whatever puts a NaN into a batch after the files were read: an augmentation, a
    division by the energy of a silent clip.
    """

    def __init__(self, clips: ClipSource, bad: int) -> None:
        super().__init__(clips)
        self.bad = bad

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mix, target = super().__getitem__(index)
        if index == self.bad:
            mix[0, mix.shape[-1] // 2] = torch.nan
        return mix, target
