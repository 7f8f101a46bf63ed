"""The model that a notebook listens to: a trained one, or a small one if there is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from diffbuf_lib.errors import ConfigError, DiffbufError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import train
from walk import Workbench
from walk.clips import FirstClips

# Trains within seconds to an audible result: see configs/demo.yaml for the reasons.
_SMALL = (
    "model={name: block_causal, base_channels: 8, channel_multipliers: [1, 2], x0_output: mask}",
    "sde={type: bbed, diffusion: {theta: 0.52, k: 2.6}}",
    *(
        "diffusion_buffer.num_frames=32",
        "diffusion_buffer.t_eps=0.03",
        "diffusion_buffer.t_max=0.99",
    ),
    "training={loss: data_prediction, optimizer: adam, lr: 3.0e-3, batch_size: 4, "
    "ema_momentum: 0.9, grad_clip: 1.0, use_amp: false, num_workers: 0}",
)
_BUFFER = 8  # frames of the small model's buffer
_EPOCH = 96  # clips, at least: every epoch ends with a checkpoint


class FoundModel(NamedTuple):
    """A model in evaluation mode, where it comes from, and whether it was trained just now."""

    model: DiffusionBufferModel
    source: str
    trained_here: bool

    def __str__(self) -> str:
        cfg = self.model.cfg
        count = sum(p.numel() for p in self.model.parameters())
        kind = "data prediction" if self.model.predicts_data else "score"
        return (
            f"model   {cfg.model.name}, {count:,} parameters, {kind}, "
            f"B = {cfg.diffusion_buffer.buffer_size}\nfrom    {self.source}"
        )


def find_model(bench: Workbench, name: str | None, folder: Path, *, steps: int = 200) -> FoundModel:
    """Load a model, or train a small one if there is none; nothing is downloaded.

    `name` is a folder that training wrote, or a name such as "diffbuf/cpu-demo"; with None, or if
    the name is not on this machine, a model is trained into `folder`, which is emptied first.
    """
    model = None if name is None else _load(bench.root, name)
    source = str(name)
    if trained_here := model is None:
        model = _train_small(bench, folder, steps)
        missing = "" if name is None else f", since {name} is not on this machine"
        source = f"{steps} steps of training just now{missing}"
    rate, own = bench.cfg.audio.sample_rate, model.cfg.audio.sample_rate
    if own != rate:
        raise ConfigError(
            f"model {name} is for {own} Hz and audio.sample_rate is {rate} Hz: take a model of "
            "that rate, or MODEL = None to train a small one here"
        )
    return FoundModel(model.to(bench.device).eval(), source, trained_here)


def _load(root: Path, name: str) -> DiffusionBufferModel | None:
    """Load from a folder, or by a name; None if the name is not on this machine."""
    folder = root / name
    if folder.is_dir() or len(Path(name).parts) != 2:
        return DiffusionBufferModel.from_pretrained(folder)
    try:
        return DiffusionBufferModel.from_pretrained(name, local_files_only=True)
    except (OSError, DiffbufError):
        return None


def _train_small(bench: Workbench, folder: Path, steps: int) -> DiffusionBufferModel:
    # An epoch has at least one step, so that num_steps decides.
    length = [f"training.num_steps={steps}", f"training.num_epochs={steps}"]
    buffer = min(_BUFFER, bench.cfg.audio.num_frames)
    cfg = bench.cfg.override(f"diffusion_buffer.buffer_size={buffer}", *_SMALL, *length)
    clips = FirstClips(bench.train_set, max(_EPOCH, len(bench.train_set)))
    shutil.rmtree(folder, ignore_errors=True)
    for _ in train(cfg, clips, None, folder):
        pass
    return DiffusionBufferModel.from_pretrained(folder / "model")
