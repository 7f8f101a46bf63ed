"""`python -m recipes.cpu_demo`: make the data from Debian's voices and train: hours on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from diffbuf_lib import load_config
from diffbuf_lib.errors import DiffbufError
from recipes.cpu_demo.pretraining import run_pretraining


def main(
    config_path: Path = Path("configs/demo_model.yaml"),
    data_path: Path = Path("data/pretraining"),
    results_path: Path = Path("results/demo_model"),
    set: tuple[str, ...] = (),
) -> None:
    """Make data from Debian's voices and train a model to ship on it: hours on a CPU.

    Args:
        config_path: what to train, in the second of two stages; the first has four times its steps.
        data_path: where the data is, or will be made from Debian's packages.
        results_path: where everything else goes; an interrupted run continues.
        set: config keys, such as training.num_steps=100.
    """
    cfg = load_config(config_path, set)
    print(run_pretraining(cfg, data_path, results_path, say=print, progress=True))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except DiffbufError as error:
        sys.exit(f"error: {error}")
