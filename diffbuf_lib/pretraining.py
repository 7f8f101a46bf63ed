"""A model to ship, from scratch: its data and its training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffbuf_lib.config import Config
from diffbuf_lib.data import open_dataset
from diffbuf_lib.data.pretraining import build_pretraining
from diffbuf_lib.training import train
from diffbuf_lib.training.results import ResultsFolder

_VALID_SECONDS = 3


def run_pretraining(
    cfg: Config,
    data_path: Path,
    results_path: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Path:
    """Make the data and train on it; what is there already is kept, an interrupted run goes on.

    Args:
        cfg: what to train, such as `configs/demo_model.yaml`.
        data_path: where the data is, or will be made.
        results_path: the run's folder.
        say: told in one line what comes next.
        progress: show progress bars on stderr.

    Returns:
        The folder of the trained model, for `from_pretrained`.

    Raises:
        DiffbufError: as in `build_pretraining` and `train`.
    """
    say(f"1/2  data: {data_path}")
    build_pretraining(data_path, progress=progress)
    train_set = open_dataset(3, data_path / "train", cfg, training=True)
    longer = cfg.override(f"audio.chunk_size={_VALID_SECONDS * cfg.audio.sample_rate}")
    valid_set = open_dataset(1, data_path / "valid", longer, training=False)
    folder = ResultsFolder(results_path)
    say(f"2/2  training: {results_path}")
    for _ in train(
        cfg, train_set, valid_set, results_path, resume=folder.last.exists(), progress=progress
    ):
        pass
    return folder.model
