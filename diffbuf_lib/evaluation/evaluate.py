"""Enhance clips with a model and the baselines it is compared with, and score them.

`evaluate` works in memory; `evaluate_folder` writes a folder, and resumes if it was stopped:

    arguments.json   what was asked for; a rerun with other arguments is refused
    journal.jsonl    a line per batch of clips: what a rerun need not do again
    scores.csv       a row per clip and method; an undefined score is empty, its reason last
    summary.json     means, intervals, gains and leads, by SNR band; what has no score, and why
    timing.json      real-time factors, latencies, and where the time went
    report.html      all of it, with players and spectrograms of the best, median, worst clip

scores.csv and summary.json are equal to the byte however often the evaluation was stopped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffbuf_lib.data import ClipDataset, open_dataset
from diffbuf_lib.data.audio import write_json
from diffbuf_lib.data.build import claim, cores, naming_deaths, parallel, take_part
from diffbuf_lib.errors import ConfigError, DataError
from diffbuf_lib.evaluation import scores
from diffbuf_lib.evaluation.baselines import NOISY, OURS, make_baselines
from diffbuf_lib.evaluation.bootstrap import summarise
from diffbuf_lib.evaluation.page import write_page
from diffbuf_lib.live import latency_report
from diffbuf_lib.model import DiffusionBufferModel, fingerprint, load_model
from diffbuf_lib.options import Job
from diffbuf_lib.training.feed import Stream, example_generators
from diffbuf_lib.training.folder import FolderLock
from diffbuf_lib.training.timing import Stopwatch

Batch = tuple[list[scores.Row], dict[str, float]]  # what a batch gave, and seconds by kind of work


def evaluate(
    model: DiffusionBufferModel,
    dataset: ClipDataset,
    metrics: Sequence[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    limit: int | None = None,
) -> Iterator[scores.ScoredClip]:
    """Enhance and score the clips (at most `limit`) of a dataset that is not opened for training.

    Neither batch_size nor the device changes the noise that a clip is enhanced with. Raises
    DataError and ConfigError as in `make_evaluator`.
    """
    evaluator = Evaluator(model, dataset, metrics, limit=limit, seed=seed)
    for start in range(0, len(evaluator.names), batch_size):
        yield from evaluator.run(range(len(evaluator.names))[start : start + batch_size])


class Evaluator:
    """Enhances and scores clips. The result of a clip does not depend on the others in its batch.

    Clips have the dataset's chunk_size or, with `longest`, are files cut to that many samples.
    """

    def __init__(
        self,
        model: DiffusionBufferModel,
        dataset: ClipDataset,
        metrics: Sequence[str],
        *,
        baselines: Sequence[str] = (),
        longest: int | None = None,
        limit: int | None = None,
        delay: int | None = None,
        seed: int = 0,
    ) -> None:
        model.sampler(delay)  # refuses a bad delay before any work is done
        if limit is not None and limit < 1:
            raise DataError(f"--limit {limit} leaves no clip: give 1 or more")
        self.model, self.dataset, self.whole = model, dataset, longest is not None
        self.rate, self.delay, self.seed = dataset.sample_rate, delay, seed
        self.metrics = scores.check_scoring(metrics, self.rate)
        self.baselines = make_baselines(baselines)
        self.methods = [NOISY, *self.baselines, OURS]
        clips = range(len(dataset))[:limit]
        self.names = [dataset.label(i) for i in clips]
        self.lengths = [dataset.chunk_size] * len(clips)  # samples
        if longest is not None:
            self.lengths = [min(longest, dataset.length(i)) for i in clips]
        self.timed = Stopwatch(next(model.parameters()).device)
        self.seconds = self.timed.seconds  # by kind of work, so far

    def run(self, indices: Sequence[int]) -> list[scores.ScoredClip]:
        """Read, enhance and score clips; DataError if a file cannot be read."""
        with self.timed("reading"):
            clips = [self.read(i) for i in indices]
        for method, waves in self.estimates(clips).items():
            for clip, wave in zip(clips, waves, strict=True):
                clip.estimates[method] = wave
                clip.scores[method] = scores.score(wave, clip.target, self.rate, self.metrics)
                for metric, spent in clip.scores[method].seconds.items():
                    self.seconds[metric] += spent
        return clips

    def read(self, i: int) -> scores.ScoredClip:
        """Read clip `i`, without estimates and scores."""
        if self.whole:
            mix, target = self.dataset.read(i, self.lengths[i])
        else:
            mix, target = self.dataset[i]
        return scores.ScoredClip(i, self.names[i], mix.mean(0), target.mean(0))

    def estimates(self, clips: Sequence[scores.ScoredClip]) -> dict[str, list[Tensor]]:
        """Return every method's estimates [T], in the order of clips."""
        found = {NOISY: [clip.mix for clip in clips]}
        for name, baseline in self.baselines.items():
            with self.timed(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # another package's, about its internals
                found[name] = [baseline(clip.mix, self.rate) for clip in clips]
        with self.timed(OURS):
            device = self.timed.device
            keys = [(clip.index,) for clip in clips]  # so each clip has its own noise in any batch
            generators = example_generators(keys, self.seed, Stream.VALID, device)
            # Silence after a shorter clip acts like a stream's end: it changes no earlier sample.
            mix = torch.nn.utils.rnn.pad_sequence(found[NOISY], batch_first=True)  # [B, T]
            out = self.model.enhance(mix[:, None].to(device), generators, self.delay)[:, 0].cpu()
            pairs = zip(out, clips, strict=True)
            found[OURS] = [wave[: len(clip.mix)].clone() for wave, clip in pairs]
        return found

    def batches(self, clips: int, seconds: float = 100.0) -> list[list[int]]:
        """Split by length into batches of at most `clips` clips and `seconds` s, or of one clip."""
        batches: list[list[int]] = [[]]
        for i in sorted(range(len(self.names)), key=lambda i: self.lengths[i]):
            padded = (len(batches[-1]) + 1) * self.lengths[i]  # the newest is the longest
            if batches[-1] and (len(batches[-1]) == clips or padded > seconds * self.rate):
                batches.append([])
            batches[-1].append(i)
        return batches


def make_evaluator(job: Job) -> Evaluator:
    """Load a job's model, data and baselines; pairs of files are read whole, up to `seconds`.

    DiffbufError if one is unknown or unavailable, or `seconds` or `limit` not above 0.
    """
    model = load_model(job.model, job.device, job.overrides)
    cfg, longest = model.cfg, sys.maxsize
    if job.seconds is not None:
        samples = job.seconds * cfg.audio.sample_rate
        if not 1 <= samples < math.inf:
            raise DataError(f"--seconds {job.seconds} is not a clip's length: give above 0")
        longest = round(samples)
        # Only audio is read here, so a clip may be shorter than the model's buffer.
        audio = cfg.audio.model_copy(update={"chunk_size": longest})
        cfg = cfg.model_copy(update={"audio": audio})
    dataset = open_dataset(job.dataset_type, job.data_path, cfg, training=False)
    return Evaluator(
        model, dataset, job.metrics, baselines=job.baselines, limit=job.limit,
        longest=longest if job.dataset_type != 3 else None, delay=job.delay, seed=job.seed,
    )  # fmt: skip


class Evaluation(NamedTuple):
    """What an evaluation found."""

    rows: list[scores.Row]  # in the order of clips and methods
    summary: dict[str, Any]  # the content of summary.json
    timing: dict[str, Any]  # the content of timing.json


def evaluate_folder(job: Job, results_path: str | Path, **options: Any) -> Evaluation:
    """Evaluate the whole dataset; options and errors are those of `evaluate_part`."""
    found = evaluate_part(job, results_path, "1/1", **options)
    assert found is not None
    return found


def evaluate_part(
    job: Job,
    results_path: str | Path,
    part: str,
    *,
    processes: int | None = None,
    page: bool = True,
    progress: bool = False,
) -> Evaluation | None:
    """Evaluate, and write everything into a results folder; resume if it was begun before.

    Part "i/n" of a job array scores every n-th batch of clips. The part that finishes last, or the
    whole ("1/1"), finds all scores and writes the rest; parts before it return None. The scores, to
    the four decimals that are kept, do not depend on parts or the number of processes (None: the
    cores of this machine). `page` is for report.html, `progress` for a bar on stderr. DiffbufError
    as in `make_evaluator`; for a clip that cannot be read; a folder that is in use or belongs to
    another evaluation; or a process that was killed.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes {processes}: give at least 1")
    evaluator, folder = make_evaluator(job), Path(results_path)
    mine = take_part(evaluator.batches(job.batch_size), part)
    home = folder if part == "1/1" else folder / "parts" / part.replace("/", "-")
    lock = FolderLock(home)
    lock.acquire()
    try:
        claim(folder / "arguments.json", _arguments(job, evaluator))
        _score_rest(job, evaluator, folder, home, mine, processes or cores(), progress)
        done = _read_journals(folder)
        if len({row.clip for rows, _ in done for row in rows}) < len(evaluator.names):
            return None
        every = {(row.clip, row.method): row for rows, _ in done for row in rows}
        rows = [every[clip, method] for clip in evaluator.names for method in evaluator.methods]
        summary = summarise(rows, evaluator.metrics)
        found = Evaluation(rows, summary, _timing(job, evaluator, done))
        scores.write_scores(folder / "scores.csv", rows, evaluator.metrics)
        write_json(folder / "summary.json", found.summary)
        write_json(folder / "timing.json", found.timing)
        if page:
            write_page(
                folder / "report.html", "evaluation", _examples(evaluator, rows),
                evaluator.metrics, evaluator.model.cfg.audio,
                found=found.summary, timing=found.timing,
            )  # fmt: skip
        return found
    finally:
        lock.release()


def _arguments(job: Job, evaluator: Evaluator) -> dict[str, Any]:
    """Return all that the scores depend on; where model and data lie does not matter."""
    clips = list(zip(evaluator.names, evaluator.lengths, strict=True))
    listing = "\n".join(f"{name} {length}" for name, length in clips)
    given = ("dataset_type", "seconds", "limit", "delay", "seed")
    return {
        "model": f"with config and weights {fingerprint(evaluator.model)}",
        "data": f"{len(clips)} clips ({hashlib.sha256(listing.encode()).hexdigest()[:16]})",
        "metrics": evaluator.metrics,
        "baselines": list(evaluator.baselines),
        **{key: getattr(job, key) for key in given},
    }


def _read_journals(folder: Path) -> list[Batch]:
    """Return all batches that are done, of the whole and of parts."""
    done = []
    for path in (folder / "journal.jsonl", *sorted(folder.glob("parts/*/journal.jsonl"))):
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # without a last line that was cut off
        entries = map(json.loads, whole.splitlines())
        done += [([scores.Row(*row) for row in rows], seconds) for rows, seconds in entries]
    return done


def _score_rest(
    job: Job,
    evaluator: Evaluator,
    folder: Path,
    home: Path,
    mine: Sequence[list[int]],
    processes: int,
    progress: bool,
) -> None:
    """Score the batches that are in no journal; each is written to the one in `home` once done."""
    known = {row.clip for rows, _ in _read_journals(folder) for row in rows}
    with open(home / "journal.jsonl", "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        left = [b for b in mine if not known.issuperset(evaluator.names[i] for i in b)]
        total = sum(map(len, mine))
        begin = total - sum(map(len, left))
        task: Callable[[list[int]], Batch] = functools.partial(_score_batch, evaluator)
        if min(processes, len(left)) > 1:
            task = functools.partial(_score_in_process, job, max(1, cores() // processes))
        # Fresh processes (a fork would copy torch's threads in whatever state they are), so a
        # script that calls this needs `if __name__ == "__main__":`.
        batches = parallel(task, left, processes, "spawn")
        bar = tqdm(total=total, initial=begin, unit="clip", desc="evaluate", disable=not progress)
        with bar, naming_deaths(), closing(batches) as scored:
            for batch in scored:
                file.write((json.dumps(batch) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(batch[0]) // len(evaluator.methods))


def _score_batch(evaluator: Evaluator, indices: Sequence[int]) -> Batch:
    evaluator.seconds.clear()
    rows = []
    for clip in evaluator.run(indices):
        seconds = round(len(clip.mix) / evaluator.rate, 4)
        for method, found in clip.scores.items():
            about = (clip.name, method, clip.snr, seconds, clip.checksum)
            rows.append(scores.Row(*about, found.values, found.undefined))
    return rows, dict(evaluator.seconds)


_evaluator_of = functools.cache(make_evaluator)


def _score_in_process(job: Job, threads: int, indices: list[int]) -> Batch:
    torch.set_num_threads(threads)
    return _score_batch(_evaluator_of(job), indices)


def _timing(job: Job, evaluator: Evaluator, done: Sequence[Batch]) -> dict[str, Any]:
    """Return real-time factors, latencies, and the seconds spent on each kind of work."""
    spent: Counter[str] = Counter()
    for _, seconds in done:
        spent.update(seconds)
    audio = sum(evaluator.lengths) / evaluator.rate
    methods = {
        name: {"latency_ms": baseline.latency_ms, "real_time_factor": spent[name] / audio}
        for name, baseline in evaluator.baselines.items()
    }
    live = latency_report(evaluator.model, job.delay, hops=30)
    methods[OURS] = {"latency_ms": live.worst_latency_ms, "real_time_factor": live.real_time_factor}
    return {
        "model": job.model,
        "data": job.data_path,
        "audio_seconds": audio,
        "methods": methods,
        "parameters": sum(p.numel() for p in evaluator.model.parameters()),
        "seconds": dict(spent),
    }


def _examples(
    evaluator: Evaluator, rows: Sequence[scores.Row]
) -> list[tuple[str, scores.ScoredClip]]:
    """Return the clips of the largest, median and smallest gain in the first metric."""
    metric = evaluator.metrics[0]
    values = {(row.method, row.clip): row.values.get(metric) for row in rows}
    pairs = ((i, values[NOISY, x], values[OURS, x]) for i, x in enumerate(evaluator.names))
    gains = sorted((y - x, i) for i, x, y in pairs if x is not None and y is not None)
    if not gains:
        return []
    places = {"Worst": 0, "Median": (len(gains) - 1) // 2, "Best": len(gains) - 1}
    chosen = {gains[place]: word for word, place in places.items()}  # each clip once
    clips = evaluator.run([i for _, i in chosen])
    gain_in = f"gain in {scores.label_of(metric)}"
    headings = (f"{word}: {gain:+.2f} {gain_in}" for (gain, _), word in chosen.items())
    return list(zip(headings, clips, strict=True))[::-1]
