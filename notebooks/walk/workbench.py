"""The set-up of every notebook: config, data and device, from two lines that the user edits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from IPython.core.getipython import get_ipython
from matplotlib.figure import Figure

from diffbuf_lib.config import Config, load_config
from diffbuf_lib.data import LAYOUTS, ClipDataset, find_layout, open_dataset
from diffbuf_lib.errors import DataError
from recipes.demo.demo_set import build_demo
from walk.panels import to_jpeg

CONFIG_VARIABLE = "DIFFBUF_CONFIG"
DATA_VARIABLE = "DIFFBUF_DATA"
_DEMO = Path("data/DN-LM-demo")


@dataclass(frozen=True)
class Workbench:
    """What a notebook works with; relative paths start at `root`, the project's folder."""

    root: Path
    cfg: Config
    data: Path
    train_set: ClipDataset  # cropped at random
    valid_set: ClipDataset  # cropped at their start; without a valid/ folder, the training clips
    results: Path  # where the notebooks write
    device: str

    def __str__(self) -> str:
        threads = torch.get_num_threads()
        return (
            f"data    {self.data} ({len(self.train_set)} training, "
            f"{len(self.valid_set)} validation clips)\n"
            f"model   {self.cfg.model.name}, K = {self.cfg.audio.num_frames} frames, "
            f"B = {self.cfg.diffusion_buffer.buffer_size} of them in the buffer\n"
            f"device  {self.device}, torch {torch.__version__}, {threads} CPU threads"
        )


def open_workbench(
    config: str | Path, data: str | Path, overrides: Sequence[str] = ()
) -> Workbench:
    """Load a config and open a dataset; the demo set is made first if it is missing.

    Relative paths start at the project's folder. The environment variables DIFFBUF_CONFIG and
    DIFFBUF_DATA, if set, win over the arguments, so that a notebook runs on other data without
    being edited. From here on a `Figure` that is a cell's last value is shown as a picture.

    The data are a folder of any layout of `diffbuf_lib.data.LAYOUTS`, or one of `train/` and
    `valid/` (else DataError); config and overrides are those of `load_config`.
    """
    shell = get_ipython()  # shows figures by itself only if pyplot is imported
    if shell is not None and shell.display_formatter is not None:
        shell.display_formatter.formatters["image/jpeg"].for_type(Figure, to_jpeg)
    here = Path.cwd()
    root = next((path for path in (here, *here.parents) if (path / "configs").is_dir()), here)
    torch.manual_seed(0)
    cfg = load_config(root / os.environ.get(CONFIG_VARIABLE, config), overrides)
    folder = root / os.environ.get(DATA_VARIABLE, data)
    if folder == root / _DEMO:
        build_demo(folder)
    train, valid = folder / "train", folder / "valid"
    train = train if train.is_dir() else folder
    return Workbench(
        root=root, cfg=cfg, data=folder, train_set=_open(train, cfg, training=True),
        valid_set=_open(valid if valid.is_dir() else train, cfg, training=False),
        results=root / "results" / "notebooks",
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip


def _open(folder: Path, cfg: Config, *, training: bool) -> ClipDataset:
    layout = find_layout(folder)
    if layout is None:
        known = "; ".join(entry.load().holds for entry in LAYOUTS.values())
        raise DataError(
            f"{folder} holds no clips: DATA (or {DATA_VARIABLE}) must name a folder with {known}"
        )
    return open_dataset(layout, folder, cfg, training=training)
