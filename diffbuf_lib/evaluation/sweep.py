"""Latency against quality: evaluate models at several buffer lengths, delays or diffusion times.

RESULTS/
  sweep.csv    a row a model, value and metric
  sweep.png    every metric against latency (against t_max, when that is varied)
  points/      the results folder of every evaluation; a sweep that is stopped goes on
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffbuf_lib import figures
from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.evaluation.baselines import NOISY
from diffbuf_lib.evaluation.points import Point, draw_sweep, to_csv
from diffbuf_lib.evaluation.runner import Evaluation, evaluate_folder
from diffbuf_lib.evaluation.work import OURS, Job
from diffbuf_lib.model import load_model

Vary = Literal["auto", "buffer_size", "delay", "t_max", "none"]
BUFFER_SIZES = (5, 10, 20, 30, 60)
T_MAX = (0.3, 0.5, 0.7, 0.8, 0.9)


def run_sweep(
    models: Sequence[str],
    job: Job,
    results_path: str | Path,
    *,
    vary: Vary = "auto",
    values: Sequence[float] = (),
    processes: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """Evaluate every model at every value, and write the table and the figure.

    The weights stay as they are. A data-prediction model gives every delay d from 1 to B by
    itself; a score model that is run with another B or t_max than it was trained with shows what
    those weights can do there, not what training for it would give: for that, train one model for
    each B and give them all with vary="none".

    Args:
        models: folders, runs or names.
        job: everything but model, delay and overrides.
        results_path: folder for all that is written.
        vary: what; auto is delay for data prediction and buffer_size for scores.
        values: to try; empty for those of the papers that fit the model.
        processes: how many work side by side.
        progress: show progress bars on stderr.
        say: told in a line what comes next.

    Raises:
        DiffbufError: as in `evaluate_folder`; or a value that a model cannot have.
    """
    results_path = Path(results_path)
    settings = [found for model in models for found in _settings(model, vary, values)]
    points = []
    for number, setting in enumerate(settings, 1):
        say(f"{number}/{len(settings)}  {setting.name}")
        found = evaluate_folder(
            replace(
                job,
                model=setting.model,
                delay=setting.delay,
                overrides=setting.overrides,
                baselines=(NOISY,),
            ),
            results_path / "points" / setting.name,
            processes=processes,
            page=False,
            progress=progress,
        )
        points.append(_point(setting, found))
    write_bytes(results_path / "sweep.csv", to_csv(points).encode())
    write_bytes(results_path / "sweep.png", figures.to_png(draw_sweep(points)))
    return points


@dataclass(frozen=True)
class _Setting:
    """One evaluation of a sweep; `name` is that of its folder."""

    name: str
    model: str
    varied: str
    cfg: Config
    overrides: tuple[str, ...] = ()
    delay: int | None = None


def _settings(model: str, vary: Vary, values: Sequence[float]) -> Iterator[_Setting]:
    """Yield what is to be evaluated of one model; refuses what it cannot do before any work."""
    cfg = load_model(model, "cpu").cfg
    B = cfg.diffusion_buffer.buffer_size
    if vary == "auto":
        vary = "delay" if cfg.training.loss == "data_prediction" else "buffer_size"
    slug = re.sub(r"[^\w.-]+", "_", model).strip("_.")
    if vary == "none":
        yield _Setting(f"{slug}-as-trained", model, vary, cfg)
        return
    most = min(cfg.num_frames, cfg.audio.num_frames)
    defaults: dict[str, Sequence[float]] = {
        "buffer_size": [n for n in BUFFER_SIZES if n <= most],
        "delay": sorted({n for n in (1, *BUFFER_SIZES) if n <= B} | {B}),
        "t_max": T_MAX,
    }
    for value in values or defaults[vary]:
        name = f"{slug}-{vary}-{value:g}"
        if vary == "t_max":
            override = f"diffusion_buffer.t_max={value}"
        elif value != int(value):
            raise ConfigError(f"{vary} {value} is no number of frames: give whole --values")
        else:
            override = f"diffusion_buffer.buffer_size={int(value)}"
        if vary == "delay":
            if not 1 <= value <= B or cfg.training.loss != "data_prediction":
                raise ConfigError(
                    f"delay {value:g} is not one that {model} can have: 1 to its buffer_size {B}, "
                    "and only with training.loss data_prediction"
                )
            yield _Setting(name, model, vary, cfg, delay=int(value))
        else:
            yield _Setting(name, model, vary, cfg.override(override), (override,))


def _point(setting: _Setting, found: Evaluation) -> Point:
    buffer = setting.cfg.diffusion_buffer
    columns = found.summary["bands"]["all"]["columns"]
    return Point(
        model=setting.model,
        loss=setting.cfg.training.loss,
        parameters=found.timing["parameters"],
        varied=setting.varied,
        buffer_size=buffer.buffer_size,
        delay=setting.delay or buffer.buffer_size,
        t_max=buffer.t_max,
        latency_ms=found.timing["methods"][OURS]["latency_ms"],
        real_time_factor=found.timing["methods"][OURS]["real_time_factor"],
        scores={
            column: {
                "clips": table["clips"],
                "mean": table["methods"][OURS]["mean"],
                "gain": table["methods"][OURS]["gain"],
                "noisy": table["methods"][NOISY]["mean"],
            }
            for column, table in columns.items()
        },
    )
