"""Make a model to ship from scratch: its data and its training."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

import recipes.cpu_demo.endless  # noqa: F401  # dataset_type 4
from diffbuf_lib.config import Config
from diffbuf_lib.data import open_dataset
from diffbuf_lib.training import train
from diffbuf_lib.training.folder import ResultsFolder
from recipes.cpu_demo import pesq_loss
from recipes.cpu_demo.dataset import build_pretraining


# In the first run the network learns from Y alone what speech under noise is. Such a step costs two
# thirds of one with own estimates in V; the second run, with fewer steps, starts from the result.
def first_stage(cfg: Config) -> Config:
    """Return the config of the first of two runs: four times the steps."""
    steps = cfg.training.num_steps
    return cfg.override(
        "training.from_noisy=true",
        "training.own_estimate=0",
        f"training.num_steps={4 * steps if steps else 'null'}",
        f"training.lr={cfg.training.lr * 5 / 3:.6g}",
        f"training.valid_every={2 * cfg.training.valid_every}",
    )


def second_stage(cfg: Config, say: Callable[[str], None]) -> Config:
    """Return the config of the second run: with a term of PESQ, where torch-pesq is installed.

    A loss that the config sets explicitly is kept.
    """
    if cfg.training.loss != "data_prediction":
        return cfg
    if find_spec("torch_pesq") is None:
        say("left out: the term of PESQ (pip install --no-deps torch-pesq torchtyping)")
        return cfg
    pesq_loss.judge(torch.device("cpu"))  # now rather than after hours
    plugins = [*cfg.plugins, "recipes.cpu_demo.endless", "recipes.cpu_demo.pesq_loss"]
    return cfg.override(f"plugins={json.dumps(plugins)}", "training.loss=data_and_pesq")


def run_pretraining(
    cfg: Config,
    data_path: Path,
    results_path: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Path:
    """Make the data and train on it; existing files are kept, an interrupted run continues.

    Args:
        cfg: what to train, such as `configs/demo_model.yaml`; `first_stage` changes it for the
            first of the two runs, whose last averaged weights the second one starts from.
        data_path: where the data is, or will be made.
        results_path: for the runs' folders, first/ and second/.
        say: is called with one line about the next step.
        progress: show progress bars on stderr.

    Returns:
        The folder of the trained model, for `from_pretrained`.

    Raises:
        DiffbufError: as in `build_pretraining` and `train`.
    """
    last = second_stage(cfg, say)
    say(f"1/3  data: {data_path}")
    build_pretraining(data_path, say=say, progress=progress)
    first, second = results_path / "first", results_path / "second"
    say(f"2/3  first stage, V from the noisy spectrum: {first}")
    _train(first_stage(cfg), data_path, first, None, progress)
    say(f"3/3  second stage, V from own estimates: {second}")
    return _train(last, data_path, second, ResultsFolder(first).last, progress)


def _train(
    cfg: Config, data_path: Path, results_path: Path, start: Path | None, progress: bool
) -> Path:
    """Train in a folder, from its last checkpoint if there is one; return the model's folder."""
    train_set = open_dataset(4, data_path / "train", cfg, training=True)
    valid_set = open_dataset(4, data_path / "valid", cfg, training=False)
    folder = ResultsFolder(results_path)
    resume = folder.last.exists()
    for _ in train(
        cfg,
        train_set,
        valid_set,
        results_path,
        resume=resume,
        start_check_point=None if resume else start,
        progress=progress,
    ):
        pass
    return folder.model
