"""Evaluate models at several buffer lengths, delays or diffusion times; or train a grid of them.

sweep.csv    a row per model, value and metric
sweep.png    every metric against latency (against t_max if that is varied; run by run for a grid)
points/      the results folder of every evaluation; a sweep that was stopped resumes
runs/        the runs that `train_grid` trained
"""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from diffbuf_lib import figures
from diffbuf_lib.config import Config
from diffbuf_lib.data import open_datasets
from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.data.build import take_part
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.evaluation.baselines import NOISY, OURS
from diffbuf_lib.evaluation.evaluate import evaluate_folder
from diffbuf_lib.evaluation.page import Mark, cell, draw_panels
from diffbuf_lib.evaluation.scores import label_of, write_csv
from diffbuf_lib.model import load_model
from diffbuf_lib.options import Job
from diffbuf_lib.trace import format_table
from diffbuf_lib.training import train

Vary = Literal["auto", "buffer_size", "delay", "t_max", "none", "grid"]
BUFFER_SIZES = (5, 10, 20, 30, 60)
T_MAX = (0.3, 0.5, 0.7, 0.8, 0.9)


class Point(NamedTuple):
    """One model at one setting."""

    model: str  # as it was given
    loss: str
    parameters: int
    varied: str  # buffer_size, delay or t_max; none or grid for a model as it was trained
    buffer_size: int  # B, frames
    delay: int  # d, frames; B unless it is varied
    t_max: float
    latency_ms: float  # the longest that a sample waits
    real_time_factor: float  # of one stream on this machine
    scores: dict[str, dict[str, Any]]  # metric -> mean, gain, noisy (as in summary.json), clips

    @property
    def setting(self) -> str:
        """The value that sets it apart from its neighbours, as text."""
        if self.varied == "t_max":
            return f"t_max {self.t_max:g}"
        return f"d {self.delay}" if self.varied == "delay" else f"B {self.buffer_size}"

    @property
    def curve(self) -> str:
        """Its model; models as they were trained share a curve per loss, except those of a grid."""
        if self.varied == "grid":
            return Path(self.model).name
        if self.varied == "none":
            return f"{self.loss}, as trained"
        return f"{self.model}: {self.loss}, {self.parameters / 1e6:.1f} M parameters"


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

    The weights stay as they are: a model that is run with a B or t_max it was not trained with
    shows what its weights can do there, not what training for it would give (for that, train one
    model for each B and give them all with vary="none", or "grid" to compare them one by one).

    `auto` varies the delay of a data-prediction model, else the buffer size; without values, those
    of the papers that fit are tried. The job gives all but model, delay, overrides and baselines;
    `say` is called with a line on what comes next. DiffbufError as in `evaluate_folder`, or for a
    value that a model does not allow.
    """
    results_path = Path(results_path)
    settings = [found for model in models for found in _settings(model, job, vary, values)]
    points = []
    for number, (name, varied, cfg, one) in enumerate(settings, 1):
        say(f"{number}/{len(settings)}  {name}")
        folder = results_path / "points" / name
        found = evaluate_folder(one, folder, processes=processes, page=False, progress=progress)
        buffer, speed = cfg.diffusion_buffer, found.timing["methods"][OURS]
        scores = {
            metric: table["methods"][OURS]
            | {"noisy": table["methods"][NOISY]["mean"], "clips": table["clips"]}
            for metric, table in found.summary["bands"]["all"]["columns"].items()
        }
        points.append(Point(
            one.model, cfg.training.loss, found.timing["parameters"], varied,
            buffer.buffer_size, one.delay or buffer.buffer_size, buffer.t_max,
            speed["latency_ms"], speed["real_time_factor"], scores,
        ))  # fmt: skip
    write_csv(results_path / "sweep.csv", _csv_rows(points))
    write_bytes(results_path / "sweep.png", figures.to_png(_draw(points)))
    return points


def train_grid(
    cfg: Config,
    over: Sequence[str],  # config keys and their values, such as training.lr=1e-3,3e-3
    train_path: Sequence[str],  # training data
    job: Job,  # gives the validation data, the layout and the device
    results_path: str | Path,
    *,
    part: str = "1/1",  # of a job array: "2/8" trains the second of eight shares
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[str] | None:
    """Train one run for every combination of values; return all runs' folders, for `run_sweep`.

    None while another part has not finished its share. A run that was stopped resumes. ConfigError
    for an invalid key, value or part; otherwise errors as in `train`.
    """
    axes = []
    for text in over:
        key, _, listed = text.partition("=")
        values = re.split(r",(?![^\[]*\])", listed)  # at commas that are not within a list
        if not all(values):
            raise ConfigError(f"--over {text}: give a key and its values, as KEY.PATH=V1,V2")
        axes.append([f"{key}={value}" for value in values])
    grid = {re.sub(r"[^\w.=+-]+", "_", " ".join(one)): one for one in itertools.product(*axes)}
    if len(grid) < math.prod(map(len, axes)):
        raise ConfigError(f"--over {' '.join(over)}: two combinations are equal or have one name")
    configs = {name: cfg.override(*one) for name, one in grid.items()}
    if mirror := cfg.training.mirror:  # else one run would go on with another's checkpoint
        configs = {n: c.override(f"training.mirror={mirror}/{n}") for n, c in configs.items()}
    folders = {name: Path(results_path) / "runs" / (name or "as-it-is") for name in grid}
    for name in take_part(list(grid), part):
        say(f"training {folders[name]}")  # for a finished run, only the config is compared
        train_set = open_datasets(job.dataset_type, train_path, configs[name], training=True)
        valid_set = open_datasets(job.dataset_type, [job.data_path], configs[name], training=False)
        options: Any = {"resume": "auto", "device": job.device, "progress": progress}
        deque(train(configs[name], train_set, valid_set, folders[name], **options), maxlen=0)
        (folders[name] / "finished").touch()
    whole = all((folder / "finished").exists() for folder in folders.values())
    return [str(folder) for folder in folders.values()] if whole else None


def overview(points: Sequence[Point]) -> str:
    """Return the points as a table for a terminal."""
    rows = [["", "", "latency", "real-time factor", *map(label_of, points[0].scores)]]
    for point in points:
        speed = [f"{point.latency_ms:.0f} ms", f"{point.real_time_factor:.3f}"]
        means = [cell(found["mean"]) for found in point.scores.values()]
        rows.append([point.model, point.setting, *speed, *means])
    return format_table(rows)


def _settings(
    model: str, job: Job, vary: Vary, values: Sequence[float]
) -> Iterator[tuple[str, str, Config, Job]]:
    """Yield folder name, what is varied, config and job; refuse what the model cannot do."""
    loaded = load_model(model, "cpu")
    cfg, B = loaded.cfg, loaded.cfg.diffusion_buffer.buffer_size
    job = replace(job, model=model, delay=None, overrides=(), baselines=())
    slug = re.sub(r"[^\w.-]+", "_", model).strip("_.")
    if vary == "auto":
        vary = "delay" if loaded.predicts_data else "buffer_size"
    if vary in ("none", "grid"):
        yield f"{slug}-as-trained", vary, cfg, job
        return
    most = min(cfg.num_frames, cfg.audio.num_frames)
    defaults: dict[str, Sequence[float]] = {
        "buffer_size": [n for n in BUFFER_SIZES if n <= most],
        "delay": sorted({n for n in (1, *BUFFER_SIZES) if n <= B} | {B}),
        "t_max": T_MAX,
    }
    for value in values or defaults[vary]:
        name = f"{slug}-{vary}-{value:g}"
        if vary != "t_max" and value != int(value):
            raise ConfigError(f"{vary} {value} is not a number of frames: give whole --values")
        if vary == "delay":
            loaded.sampler(int(value))  # refuses what the model cannot have
            yield name, vary, cfg, replace(job, delay=int(value))
        else:
            override = f"diffusion_buffer.{vary}={value if vary == 't_max' else int(value)}"
            yield name, vary, cfg.override(override), replace(job, overrides=(override,))


def _csv_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return a row per point and metric; None where no clip has a score."""
    rows = []
    for point in points:
        settings = point._asdict()
        for metric, found in settings.pop("scores").items():
            mean, gain, noisy = (found[key] or {} for key in ("mean", "gain", "noisy"))
            ends = {key: mean.get(key) for key in ("mean", "low", "high")}
            ends |= {"gain": gain.get("mean"), "noisy": noisy.get("mean"), "clips": found["clips"]}
            rows.append({**settings, "metric": metric, **ends})
    return rows


def _draw(points: Sequence[Point]) -> Figure:
    """Draw every metric against latency, against t_max if varied, or run by run for a grid."""
    by_time = all(point.varied == "t_max" for point in points)
    grid = all(point.varied == "grid" for point in points)
    panels: dict[str, dict[str, list[Mark]]] = {metric: {} for metric in points[0].scores}
    xs = [i if grid else p.t_max if by_time else p.latency_ms for i, p in enumerate(points, 1)]
    for x, point in sorted(zip(xs, points, strict=True), key=itemgetter(0)):
        for metric, curves in panels.items():
            if mean := point.scores[metric]["mean"]:
                word = "" if grid else point.setting
                curves.setdefault(point.curve, []).append((x, mean, word))
    label = "largest diffusion time t_max" if by_time else "latency (ms)"
    figure = draw_panels(panels, "run" if grid else label)
    for axes, metric in zip(figure.axes, panels, strict=True):
        if noisy := points[0].scores[metric]["noisy"]:
            axes.axhline(noisy["mean"], color="0.4", linestyle="--", linewidth=1)
            axes.annotate(
                NOISY, (0.99, noisy["mean"]), xycoords=("axes fraction", "data"), fontsize=7,
                xytext=(0, 2), textcoords="offset points", ha="right",
            )  # fmt: skip
    return figure
