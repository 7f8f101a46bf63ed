"""Evaluate a model and baselines on a dataset: what `diffbuf evaluate` does."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.evaluation.baselines import NOISY
from diffbuf_lib.evaluation.page import write_page
from diffbuf_lib.evaluation.results import Batch, EvaluationFolder, Row, to_json
from diffbuf_lib.evaluation.scoring import columns_of
from diffbuf_lib.evaluation.statistics import LEVEL, RESAMPLES, compare_methods, group
from diffbuf_lib.evaluation.work import OURS, Job, Worker, all_rows, run_batches
from diffbuf_lib.live import latency_report
from diffbuf_lib.model import fingerprint
from diffbuf_lib.training.lock import FolderLock


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        rows: a row a clip and method, in the order of clips and methods.
        summary: the content of summary.json.
        timing: the content of timing.json.
    """

    rows: list[Row]
    summary: dict[str, Any]
    timing: dict[str, Any]


def evaluate_folder(
    job: Job,
    results_path: str | Path,
    *,
    processes: int | None = None,
    page: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Evaluate, and write everything into a results folder; go on if it was begun before.

    The scores do not depend on the number of processes, but for float rounding far below the four
    decimals that are kept.

    Args:
        job: what is to be evaluated.
        results_path: the folder; see `diffbuf_lib.evaluation.results` for what is in it.
        processes: how many work side by side; None for the cores of this machine.
        page: whether to write report.html.
        progress: show a progress bar on stderr.

    Raises:
        DiffbufError: a model, dataset, metric, baseline or delay that cannot be had; a clip that
            cannot be read; or a folder that belongs to another evaluation.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes {processes}: give at least 1")
    worker = Worker(job)
    folder = EvaluationFolder(results_path)
    lock = FolderLock(folder.path)
    lock.acquire()
    try:
        done = folder.open(_arguments(job, worker))
        done += _run(worker, folder, done, processes or _cores(), progress)
        rows = all_rows(done)
        ordered = [rows[i, method] for i in worker.clips.indices for method in worker.methods]
        folder.write_scores(ordered, job.metrics)
        result = Evaluation(
            rows=ordered,
            summary=summarise(ordered, columns_of(job.metrics)),
            timing=_timing(worker, done),
        )
        write_bytes(folder.summary, to_json(result.summary))
        write_bytes(folder.timing, to_json(result.timing))
        if page:
            write_page(folder.report, worker, result.rows, result.summary, result.timing)
        return result
    finally:
        lock.release()


def summarise(rows: Sequence[Row], columns: Sequence[str], ours: str = OURS) -> dict[str, Any]:
    """Sum up rows: the content of summary.json.

    A metric's numbers are over the clips for which every method has a score, so that all are
    compared on the same clips.

    Args:
        rows: of every clip and method.
        columns: of the scores.
        ours: the method whose lead over the others is wanted.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    snrs = {row.clip: row.snr for row in rows}
    tables = {
        column: {
            method: {
                row.clip: row.values[column]
                for row in rows
                if row.method == method and column in row.values
            }
            for method in methods
        }
        for column in columns
    }
    return {
        "clips": len(snrs),
        "methods": methods,
        "interval": f"{LEVEL:.0%} percentile bootstrap over clips, {RESAMPLES} resamples",
        "bands": {
            name: {
                "clips": len(clips),
                "columns": {
                    column: _plain(compare_methods(table, clips, ours=ours, noisy=NOISY))
                    for column, table in tables.items()
                },
            }
            for name, clips in group(snrs).items()
        },
        "undefined": [
            {"clip": row.clip, "method": row.method, "metric": metric, "reason": reason}
            for row in rows
            for metric, reason in row.undefined.items()
        ],
    }


def _run(
    worker: Worker, folder: EvaluationFolder, done: Sequence[Batch], processes: int, progress: bool
) -> list[Batch]:
    """Do what is not done yet."""
    known = {index for index, _ in all_rows(done)}
    batches = worker.clips.batches(worker.job.batch_size)
    left = [batch for batch in batches if not known.issuperset(batch)]
    total = len(worker.clips)
    finished = total - sum(map(len, left))
    new = []
    threads = max(1, _cores() // processes)
    with (
        tqdm(
            total=total, initial=finished, unit="clip", desc="evaluate", disable=not progress
        ) as bar,
        closing(run_batches(worker, left, processes, threads)) as batches_done,
    ):
        for batch in batches_done:
            folder.append(batch)
            new.append(batch)
            bar.update(len(batch.rows) // len(worker.methods))
    return new


def _arguments(job: Job, worker: Worker) -> dict[str, Any]:
    """Return all that the scores depend on. Where model and data lie does not matter."""
    clips = worker.clips
    listing = "\n".join(f"{n} {t}" for n, t in zip(clips.names, clips.lengths, strict=True))
    return {
        "model": f"with config and weights {fingerprint(worker.model)}",
        "data": f"{len(clips)} clips ({hashlib.sha256(listing.encode()).hexdigest()[:16]})",
        "dataset_type": job.dataset_type,
        "metrics": list(job.metrics),
        "baselines": list(worker.baselines),
        "seconds": job.seconds,
        "limit": job.limit,
        "delay": job.delay,
        "seed": job.seed,
    }


def _timing(worker: Worker, done: Sequence[Batch]) -> dict[str, Any]:
    """Return real-time factors, latencies, and the seconds spent on each kind of work."""
    spent: dict[str, float] = defaultdict(float)
    for batch in done:
        for name, seconds in batch.seconds.items():
            spent[name] += seconds
    audio = sum(worker.clips.lengths) / worker.clips.rate
    methods = {
        name: {
            "latency_ms": baseline.latency_ms,
            "real_time_factor": spent[name] / audio,
        }
        for name, baseline in worker.baselines.items()
    }
    live = latency_report(worker.model, worker.job.delay, hops=30)
    methods[OURS] = {"latency_ms": live.latency_ms, "real_time_factor": live.real_time_factor}
    return {
        "model": worker.job.model,
        "data": worker.job.data_path,
        "audio_seconds": audio,
        "methods": methods,
        "parameters": sum(p.numel() for p in worker.model.parameters()),
        "seconds": dict(spent),
    }


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table of `compare_methods` as JSON has it."""
    return {
        "clips": table["clips"],
        "methods": {
            method: {name: x._asdict() if x else None for name, x in found.items()}
            for method, found in table["methods"].items()
        },
    }


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
