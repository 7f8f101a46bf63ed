"""A tiny run: a synthetic data set and a config whose steps take milliseconds."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffbuf_lib.config import Config, build_config
from diffbuf_lib.data.audio import write_audio
from diffbuf_lib.errors import DataError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import StepRecord, load_checkpoint, train
from diffbuf_lib.training.feed import EpochPlan

TREE = {
    "audio": {"chunk_size": 4000, "stft": {"n_fft": 62, "win_length": 62, "hop_length": 62}},
    "model": {"name": "conv", "base_channels": 4, "num_layers": 1},
    "diffusion_buffer": {"buffer_size": 3, "num_frames": 6},
    "training": {
        "loss": "weighted_score",
        "lr": 1e-3,
        "batch_size": 2,
        "ema_momentum": 0.9,
        "num_epochs": 2,
        "use_amp": False,
        "num_workers": 0,
        "valid_clips": 2,
        "log_every": 1,
    },
}


def config(*overrides: str) -> Config:
    return build_config(TREE, overrides)


class Clips:
    """Deterministic noisy tones; `bad` clips hold a NaN, `broken` ones cannot be read.

    `on_read` is called with the index of a clip that is about to be read.
    """

    def __init__(
        self, size: int = 7, bad: Sequence[int] = (), broken: Sequence[int] = (), *,
        seed: int = 0, length: int = 4000, on_read: Callable[[int], Any] = bool,
    ) -> None:  # fmt: skip
        self.size, self.bad, self.broken, self.on_read = size, bad, broken, on_read
        self.seed, self.length, self.epoch = seed, length, 0
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.on_read(index)
        if index in self.broken:
            raise DataError("the header is damaged")
        self.read.append(index)
        generator = torch.Generator().manual_seed(1000 * self.seed + 100 * index + self.epoch)
        time = torch.arange(self.length) / 16000
        target = 0.3 * torch.sin(2 * torch.pi * (200 + 50 * index) * time)[None]
        mix = target + 0.3 * torch.randn(1, self.length, generator=generator)
        if index in self.bad:
            mix[0, 17] = torch.nan
        return mix, target

    def name(self, index: int) -> str:
        return f"clip_{index:03}.wav"

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Hooked(DiffusionBufferModel):
    """A model that calls `before` with the mix [B, C, T], and returns `after` of the loss."""

    def __init__(
        self, cfg: Config, *, before: Callable[[torch.Tensor], Any] = id,
        after: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    ) -> None:  # fmt: skip
        super().__init__(cfg)
        self.before, self.after = before, after

    def forward(self, mix: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.before(mix)
        return self.after(super().forward(mix, *args, **options))


def scaled(cfg: Config, factor: float = 1e37) -> Hooked:
    """Make a model with a finite loss that is too large: the norm of the gradient overflows."""
    return Hooked(cfg, after=lambda loss: factor * loss)


def write_clips(root: Path, size: int = 7) -> Path:
    """Write clips into a DN-LM folder."""
    for i in range(size):
        (root / f"sample_{i:05}").mkdir(parents=True)
        for name, wave in zip(("mixture", "vocals"), Clips()[i], strict=True):
            write_audio(root / f"sample_{i:05}" / f"{name}.wav", wave.clamp(-0.99, 0.99), 16000)
    return root


def clip_of(step: int, size: int = 7) -> int:
    """The clip of a step of the first epoch, at a batch size of 1."""
    return EpochPlan(size, 1, 1, 1, seed=0).order(0)[step - 1]


def fit(cfg: Config, path: Path, steps: int | None = None, **options: Any) -> list[StepRecord]:
    """Take all records of a run, or only the first so many, and close it."""
    valid_set = options.pop("valid_set", Clips(3, seed=1))
    train_set = options.pop("train_set", Clips())
    run = train(cfg, train_set, valid_set, path, device="cpu", **options)
    records = []
    for record in run:
        records.append(record)
        if len(records) == steps:
            run.close()
    return records


def last(path: Path) -> dict[str, Any]:
    return load_checkpoint(path / "checkpoints" / "last.pt")


def history(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines]


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_state(one: Path, other: Path) -> None:
    a, b = last(one), last(other)
    learnt = "model ema optimizer scheduler step epoch examples best bad_validations"
    for key in learnt.split():
        assert same(a[key], b[key]), f"{key} differs"


def assert_same_run(one: Path, other: Path) -> None:
    assert_same_state(one, other)
    assert history(one) == history(other)


def full_disk(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
