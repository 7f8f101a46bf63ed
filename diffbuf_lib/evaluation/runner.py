"""What `diffbuf evaluate` does: score a dataset into a results folder, on several processes."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffbuf_lib.errors import CheckpointError, ConfigError
from diffbuf_lib.evaluation.baselines import NOISY
from diffbuf_lib.evaluation.evaluate import OURS, Evaluator, open_clips
from diffbuf_lib.evaluation.page import write_page
from diffbuf_lib.evaluation.results import Batch, EvaluationFolder, Row, summarise, write_json
from diffbuf_lib.evaluation.scores import label_of
from diffbuf_lib.live import latency_report
from diffbuf_lib.model import fingerprint, load_model
from diffbuf_lib.training.folder import FolderLock


@dataclass(frozen=True)
class Job:
    """What is to be evaluated, and how: all that another process needs."""

    model: str  # folder, run or name, as `load_model` takes it
    data_path: str
    dataset_type: int = 1  # as in training
    metrics: tuple[str, ...] = ("si_sdr", "sdr", "pesq", "estoi")
    baselines: tuple[str, ...] = (NOISY,)  # noisy is always there
    seconds: float | None = None  # length of a clip at most; None for the whole clip
    limit: int | None = None  # only the first so many clips
    delay: int | None = None  # d of a data-prediction model; None for B
    seed: int = 0  # of the diffusion noise
    batch_size: int = 8  # clips enhanced at a time
    device: str = "auto"
    overrides: tuple[str, ...] = ()  # keys of the model's config that are changed

    def evaluator(self) -> Evaluator:
        """Load model, data and baselines; DiffbufError if one is unknown or unavailable."""
        model = load_model(self.model, self.device, self.overrides)
        clips = open_clips(self.dataset_type, self.data_path, model.cfg, self.seconds, self.limit)
        import_module("torchmetrics.functional.audio")  # seconds, which are no metric's own
        return Evaluator(
            model, clips, self.metrics,
            baselines=self.baselines, delay=self.delay, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    rows: list[Row]  # in the order of clips and methods
    summary: dict[str, Any]  # the content of summary.json
    timing: dict[str, Any]  # the content of timing.json


def evaluate_folder(
    job: Job,
    results_path: str | Path,
    *,
    processes: int | None = None,
    page: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Evaluate, and write everything into a results folder; go on if it was begun before.

    The scores, to the four decimals that are kept, do not depend on the number of processes.

    Args:
        job: what is to be evaluated.
        results_path: the folder.
        processes: how many work side by side; None for the cores of this machine.
        page: whether to write report.html.
        progress: show a progress bar on stderr.

    Raises:
        DiffbufError: a model, dataset, metric, baseline or delay that is unknown or unavailable; a
            clip that cannot be read; or a folder that belongs to another evaluation.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes {processes}: give at least 1")
    evaluator = job.evaluator()
    folder = EvaluationFolder(results_path)
    lock = FolderLock(folder.path)
    lock.acquire()
    try:
        done = folder.open(_arguments(job, evaluator))
        done += _score_rest(job, evaluator, folder, done, processes or _cores(), progress)
        rows = {(row.index, row.method): row for batch in done for row in batch.rows}
        ordered = [rows[i, m] for i in evaluator.clips.indices for m in evaluator.methods]
        result = Evaluation(
            rows=ordered,
            summary=summarise(ordered, evaluator.metrics),
            timing=_timing(job, evaluator, done),
        )
        folder.write_scores(ordered, evaluator.metrics)
        write_json(folder.summary, result.summary)
        write_json(folder.timing, result.timing)
        if page:
            _write_page(folder.report, evaluator, result)
        return result
    finally:
        lock.release()


def _score_rest(
    job: Job,
    evaluator: Evaluator,
    folder: EvaluationFolder,
    done: Sequence[Batch],
    processes: int,
    progress: bool,
) -> list[Batch]:
    """Score the clips that are not done yet; every batch is in the journal as soon as it is."""
    known = {row.index for batch in done for row in batch.rows}
    batches = evaluator.clips.batches(job.batch_size)
    left = [batch for batch in batches if not known.issuperset(batch)]
    total, new = len(evaluator.clips), []
    finished = total - sum(map(len, left))
    bar = tqdm(total=total, initial=finished, unit="clip", desc="evaluate", disable=not progress)
    with bar, closing(_score_batches(job, evaluator, left, processes)) as scored:
        for batch in scored:
            folder.append(batch)
            new.append(batch)
            bar.update(len(batch.rows) // len(evaluator.methods))
    return new


def _score_batches(
    job: Job, evaluator: Evaluator, batches: Sequence[list[int]], processes: int
) -> Generator[Batch, None, None]:
    """Yield batches as they are done, in any order.

    Several processes are fresh ones (spawn: a fork would copy torch's threads in whatever state
    they are, which rules out tqdm's `process_map`), so a script that calls this needs
    `if __name__ == "__main__":`.

    Raises:
        CheckpointError: a process was killed, as the system does when memory runs out.
    """
    if processes == 1 or len(batches) < 2:
        yield from (_score_batch(evaluator, batch) for batch in batches)
        return
    pool = ProcessPoolExecutor(
        min(processes, len(batches)),
        mp_context=get_context("spawn"),
        initializer=_start_process,
        initargs=(max(1, _cores() // processes),),
    )
    try:
        futures = [pool.submit(_score_in_process, job, batch) for batch in batches]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise CheckpointError(
            f"one of {processes} processes was killed, most likely for want of memory: the same "
            "command goes on where it stopped; give it fewer --processes or a smaller --batch_size"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _score_batch(evaluator: Evaluator, indices: Sequence[int]) -> Batch:
    evaluator.seconds.clear()
    rows = [
        Row(
            index=clip.index,
            clip=clip.name,
            method=method,
            snr=clip.snr,
            seconds=round(len(clip.mix) / evaluator.clips.rate, 4),
            checksum=clip.checksum,
            values=scores.values,
            undefined=scores.undefined,
        )
        for clip in evaluator.run(indices)
        for method, scores in clip.scores.items()
    ]
    return Batch(rows, dict(evaluator.seconds))


def _start_process(threads: int) -> None:
    """Make a process ready; Ctrl-C is its parent's matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _score_in_process(job: Job, indices: list[int]) -> Batch:
    return _score_batch(_evaluator_of(job), indices)


@functools.cache
def _evaluator_of(job: Job) -> Evaluator:
    return job.evaluator()


def _arguments(job: Job, evaluator: Evaluator) -> dict[str, Any]:
    """Return all that the scores depend on. Where model and data lie does not matter."""
    clips = evaluator.clips
    listing = "\n".join(f"{n} {t}" for n, t in zip(clips.names, clips.lengths, strict=True))
    return {
        "model": f"with config and weights {fingerprint(evaluator.model)}",
        "data": f"{len(clips)} clips ({hashlib.sha256(listing.encode()).hexdigest()[:16]})",
        "dataset_type": job.dataset_type,
        "metrics": evaluator.metrics,
        "baselines": list(evaluator.baselines),
        "seconds": job.seconds,
        "limit": job.limit,
        "delay": job.delay,
        "seed": job.seed,
    }


def _timing(job: Job, evaluator: Evaluator, done: Sequence[Batch]) -> dict[str, Any]:
    """Return real-time factors, latencies, and the seconds spent on each kind of work."""
    spent: Counter[str] = Counter()
    for batch in done:
        spent.update(batch.seconds)
    audio = sum(evaluator.clips.lengths) / evaluator.clips.rate
    methods = {
        name: {"latency_ms": baseline.latency_ms, "real_time_factor": spent[name] / audio}
        for name, baseline in evaluator.baselines.items()
    }
    live = latency_report(evaluator.model, job.delay, hops=30)
    methods[OURS] = {"latency_ms": live.latency_ms, "real_time_factor": live.real_time_factor}
    return {
        "model": job.model,
        "data": job.data_path,
        "audio_seconds": audio,
        "methods": methods,
        "parameters": sum(p.numel() for p in evaluator.model.parameters()),
        "seconds": dict(spent),
    }


def _write_page(path: Path, evaluator: Evaluator, found: Evaluation) -> None:
    """Write report.html, with the clips of the largest, the median and the smallest gain."""
    metric = evaluator.metrics[0]
    scores = {(row.method, row.index): row.values.get(metric) for row in found.rows}
    pairs = ((i, scores[NOISY, i], scores[OURS, i]) for i in evaluator.clips.indices)
    gains = sorted((y - x, i) for i, x, y in pairs if x is not None and y is not None)
    places = {"Worst": 0, "Median": (len(gains) - 1) // 2, "Best": len(gains) - 1}
    chosen = {gains[place][1]: (what, gains[place][0]) for what, place in places.items() if gains}
    headings = [f"{what}: {gain:+.2f} gain in {label_of(metric)}" for what, gain in chosen.values()]
    clips = evaluator.run(list(chosen)) if chosen else []
    shown = list(zip(headings, clips, strict=True))[::-1]
    write_page(path, shown, found.summary, found.timing, evaluator.model.cfg.audio)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
