"""Breaking things on purpose: what a notebook needs to cause a failure and keep its message."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import StepRecord, train
from diffbuf_lib.training.feed import ClipSource
from walk.clips import FirstClips

SMALL = (
    "model={name: conv, base_channels: 16, num_layers: 2}",
    "sde={type: bbed, diffusion: {theta: 0.08, k: 2.6}}",
    "diffusion_buffer={buffer_size: 8, time_sampling: linspace, leading_zeros: false}",
    "training={loss: score, batch_size: 2, num_steps: 4, use_amp: false, num_workers: 0}",
)
"""Overrides that make any config one whose four steps take a second."""


def caught(action: Callable[[], object]) -> Exception:
    """Run what ought to fail, and return its error; AssertionError if it does not fail."""
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing failed here: the fault was not caused")


def read(error: Exception, root: Path, width: int = 96) -> str:
    """Return an error's class and message, wrapped to a page, with paths from `root` on."""
    text = f"{type(error).__name__}: {error}".replace(f"{root}{os.sep}", "")
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def few_steps(
    cfg: Config,
    clips: ClipSource,
    folder: Path,
    *,
    model: DiffusionBufferModel | None = None,
    resume: bool = False,
) -> list[StepRecord]:
    """Train on the CPU, without validation, to `training.num_steps`; arguments as in `train`.

    The folder is emptied first, unless its run is resumed.
    """
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    return list(train(cfg, clips, None, folder, model=model, resume=resume, device="cpu"))


class Mono(FirstClips):
    """Clips averaged to mono, so that clips of any number of channels make a batch."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mix, target = super().__getitem__(index)
        return mix.mean(0, keepdim=True), target.mean(0, keepdim=True)


class Spoilt(Mono):
    """Mono clips, of which clip `bad` has a NaN in the middle of its mixture.

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


def write_pair(
    folder: Path, mix: Tensor, target: Tensor, sample_rate: int, nan_at: int | None = None
) -> Path:
    """Write one clip as a DN-LM split of 32-bit float files, which can hold a NaN.

    Args:
        folder: of the split; emptied first.
        mix: [C, T], full scale 1.
        target: [C, T]; may have other channels than mix, to see what comes of it.
        sample_rate: Hz.
        nan_at: sample of the mixture that becomes NaN.

    Returns:
        The split's folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    sample = folder / "sample_00000"
    sample.mkdir(parents=True)
    mix = mix.clone()
    if nan_at is not None:
        mix[:, nan_at] = torch.nan
    for name, wave in (("mixture", mix), ("vocals", target)):
        # Not write_audio, which refuses to write a NaN.
        soundfile.write(sample / f"{name}.wav", wave.T.numpy(), sample_rate, subtype="FLOAT")
    return folder


class Hungry(DiffusionBufferModel):
    """A model that says it has no memory for a batch of more than `capacity` clips.

    It raises what torch raises on a GPU, and takes no memory.
    """

    def __init__(self, cfg: Config, capacity: int) -> None:
        super().__init__(cfg)
        self.capacity = capacity

    def forward(self, mix: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return what the model returns, or raise torch.OutOfMemoryError."""
        if len(mix) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB")
        return super().forward(mix, *args, **options)
