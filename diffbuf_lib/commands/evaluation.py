"""`diffbuf evaluate|compare|sweep`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from diffbuf_lib.commands.common import say


def evaluate_command(
    model: str,
    data_path: Path,
    results_path: Path | None = None,
    dataset_type: int = 1,
    metrics: tuple[str, ...] = ("si_sdr", "sdr", "pesq", "estoi"),
    baselines: tuple[str, ...] = ("noisy",),
    seconds: float | None = None,
    limit: int | None = None,
    delay: int | None = None,
    seed: int = 0,
    processes: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> None:
    """Score a model on a dataset, beside the noisy input and other methods.

    Args:
        model: folder of a trained model, a run's folder, or a name such as diffbuf/cpu-demo.
        data_path: dataset folder.
        results_path: folder for scores.csv, summary.json, timing.json and report.html; a stopped
            evaluation goes on when started again. Without it only the table is printed.
        dataset_type: as in train.
        metrics: si_sdr sdr pesq estoi, and distillmos dnsmos, which need no clean speech and take
            longer.
        baselines: noisy (always there), noisereduce, noisereduce_nonstationary, deepfilternet.
        seconds: length of a clip at most; default: whole clips.
        limit: only the first clips.
        delay: frames from a sample to its output, 1 to buffer_size, of a data-prediction model.
        seed: of the diffusion noise.
        processes: how many work side by side; default: the cores of this machine.
        batch_size: clips enhanced at a time.
        device: auto, cpu or cuda.
    """
    from diffbuf_lib.evaluation import Job, evaluate_folder
    from diffbuf_lib.evaluation.page import gains_table, overview, times
    from diffbuf_lib.trace import format_table

    job = Job(
        model=model, data_path=str(data_path), dataset_type=dataset_type, metrics=metrics,
        baselines=baselines, seconds=seconds, limit=limit, delay=delay, seed=seed,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    with ExitStack() as stack:
        folder = results_path or stack.enter_context(tempfile.TemporaryDirectory())
        found = evaluate_folder(
            job, folder, processes=processes, page=results_path is not None, progress=True
        )
    print(overview(found.summary))
    if len(found.summary["bands"]) > 2:
        column = next(iter(found.summary["bands"]["all"]["columns"]))
        print(f"\n{format_table(gains_table(found.summary, column))}")
    print(f"\n{times(found.timing)}")
    if results_path is not None:
        print(f"\n{results_path / 'report.html'}")


def compare_command(
    a: Positional[Path], b: Positional[Path], method: str = "diffbuf", seed: int = 0
) -> None:
    """Compare two evaluations of the same clips, paired clip by clip.

    Args:
        a: results folder of an evaluation.
        b: another; what is shown is b - a.
        method: noisy, a baseline or diffbuf.
        seed: of the bootstrap intervals.
    """
    from diffbuf_lib.evaluation.results import compare_folders, render_differences

    print(f"a: {a}\nb: {b}\n{method}; 95 % intervals of the paired difference in brackets")
    print(render_differences(compare_folders(a, b, method=method, seed=seed)))


def sweep_command(
    models: tuple[str, ...],
    data_path: Path,
    results_path: Path,
    vary: Literal["auto", "buffer_size", "delay", "t_max", "none"] = "auto",
    values: tuple[float, ...] = (),
    dataset_type: int = 1,
    metrics: tuple[str, ...] = ("pesq", "estoi", "si_sdr"),
    seconds: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    processes: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> None:
    """Plot quality against latency: sweep.csv and sweep.png.

    Args:
        models: folders of trained models, runs' folders, or names.
        data_path: dataset folder.
        results_path: folder for everything; a stopped sweep goes on when started again.
        vary: buffer_size (B), delay (d) or t_max, with the weights as they are; none: models as
            they were trained; auto: delay for data prediction, buffer_size for scores.
        values: of what is varied; default: B of 5 10 20 30 60, d of 1 5 10 20 30 60 up to B, t_max
            of 0.3 0.5 0.7 0.8 0.9.
        dataset_type: as in train.
        metrics: as in evaluate.
        seconds: length of a clip at most; default: whole clips.
        limit: only the first clips.
        seed: of the diffusion noise.
        processes: how many work side by side; default: the cores of this machine.
        batch_size: clips enhanced at a time.
        device: auto, cpu or cuda.
    """
    from diffbuf_lib.evaluation import Job
    from diffbuf_lib.evaluation.sweep import overview, run_sweep

    job = Job(
        model=models[0], data_path=str(data_path), dataset_type=dataset_type, metrics=metrics,
        seconds=seconds, limit=limit, seed=seed, batch_size=batch_size, device=device,
    )  # fmt: skip
    points = run_sweep(
        models, job, results_path, vary=vary, values=values, processes=processes, progress=True,
        say=say,
    )  # fmt: skip
    print(overview(points))
    print(results_path / "sweep.png")
