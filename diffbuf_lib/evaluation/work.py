"""The work on one batch of clips, in this process or in one of several."""

from __future__ import annotations

import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context

import torch
from torch import Tensor

from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.evaluation.baselines import NOISY, make_baselines
from diffbuf_lib.evaluation.clips import Clip, Clips, clip_generators, pad_batch
from diffbuf_lib.evaluation.results import Batch, Row
from diffbuf_lib.evaluation.scoring import check_scoring, score
from diffbuf_lib.model import load_model

OURS = "diffbuf"
"""What the evaluated model is called among the methods."""


@dataclass(frozen=True)
class Job:
    """What is to be evaluated, and how: all that another process needs.

    Attributes:
        model: folder, run or name, as `load_model` takes it.
        data_path: dataset folder.
        dataset_type: 1, 2 or 3, as in training.
        metrics: names in `scoring.METRICS`.
        baselines: names in `baselines.BASELINES`, or noisy, which is always there.
        seconds: length of a clip at most; None for the whole clip.
        limit: only the first so many clips.
        delay: d of a data-prediction model; None for B.
        seed: of the diffusion noise.
        batch_size: clips enhanced at a time.
        device: auto, cpu, cuda or cuda:N.
        overrides: keys of the model's config that are changed.
    """

    model: str
    data_path: str
    dataset_type: int = 1
    metrics: tuple[str, ...] = ("si_sdr", "sdr", "pesq", "estoi")
    baselines: tuple[str, ...] = (NOISY,)
    seconds: float | None = None
    limit: int | None = None
    delay: int | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"
    overrides: tuple[str, ...] = ()


class Worker:
    """Enhances and scores batches; one a process.

    Args:
        job: what is to be evaluated.

    Raises:
        DiffbufError: a model, dataset, metric, baseline or delay that cannot be had.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = load_model(job.model, job.device, job.overrides)
        self.model.sampler(job.delay)  # refuses a delay before any work is done
        check_scoring(job.metrics, self.model.cfg.audio.sample_rate)
        import_module("torchmetrics.functional.audio")  # seconds, which are no metric's own
        self.baselines = make_baselines(job.baselines)
        self.clips = Clips(job.dataset_type, job.data_path, self.model.cfg, job.seconds, job.limit)

    @property
    def methods(self) -> list[str]:
        """All that is scored, in the order of tables."""
        return [NOISY, *self.baselines, OURS]

    def run(self, indices: Sequence[int]) -> Batch:
        """Enhance and score clips; the result does not depend on which others are with them."""
        seconds: dict[str, float] = defaultdict(float)
        begun = time.perf_counter()
        clips = [self.clips[i] for i in indices]
        seconds["reading"] = time.perf_counter() - begun
        rows = []
        for method, estimates in self.estimates(clips, seconds):
            for clip, estimate in zip(clips, estimates, strict=True):
                scores = score(estimate, clip.target, self.clips.rate, self.job.metrics)
                for metric, spent in scores.seconds.items():
                    seconds[metric] += spent
                rows.append(self._row(clip, method, scores.values, scores.undefined))
        return Batch(rows, dict(seconds))

    def estimates(
        self, clips: Sequence[Clip], seconds: dict[str, float] | None = None
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield every method with its estimates [T], in the order of clips.

        Args:
            clips: as `Clips` gives them.
            seconds: is added the time that each method takes; a missing key counts as 0.
        """
        spent: dict[str, float] = defaultdict(float) if seconds is None else seconds
        yield NOISY, [clip.mix for clip in clips]
        for name, baseline in self.baselines.items():
            begun = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # another package's, about its own insides
                found = [baseline(clip.mix, self.clips.rate) for clip in clips]
            spent[name] += time.perf_counter() - begun
            yield name, found
        begun = time.perf_counter()
        found = self._enhance(clips)
        spent[OURS] += time.perf_counter() - begun
        yield OURS, found

    def _enhance(self, clips: Sequence[Clip]) -> list[Tensor]:
        device = next(self.model.parameters()).device
        generators = clip_generators([clip.index for clip in clips], self.job.seed, device)
        mix = pad_batch([clip.mix for clip in clips]).to(device)
        out = self.model.enhance(mix, generators, self.job.delay)[:, 0].cpu()
        return [wave[: len(clip.mix)].clone() for wave, clip in zip(out, clips, strict=True)]

    def _row(
        self, clip: Clip, method: str, values: dict[str, float], undefined: dict[str, str]
    ) -> Row:
        return Row(
            index=clip.index,
            clip=clip.name,
            method=method,
            snr=None if clip.snr is None else round(clip.snr, 3),
            seconds=round(len(clip.mix) / self.clips.rate, 4),
            checksum=clip.checksum,
            values=values,
            undefined=undefined,
        )


def run_batches(
    worker: Worker, batches: Sequence[list[int]], processes: int, threads: int
) -> Generator[Batch, None, None]:
    """Yield batches as they are done, in any order.

    With one process the work is done here. With several it is done in fresh ones (spawn: a fork
    would copy torch's threads in whatever state they are), so a script that calls this needs
    `if __name__ == "__main__":`.

    Args:
        worker: of this process.
        batches: indices of clips.
        processes: how many work side by side.
        threads: torch's threads in each of several processes.

    Raises:
        CheckpointError: a process was killed, as the system does when memory runs out.
    """
    if processes == 1 or len(batches) < 2:
        yield from map(worker.run, batches)
        return
    pool = ProcessPoolExecutor(
        min(processes, len(batches)),
        mp_context=get_context("spawn"),
        initializer=_start,
        initargs=(worker.job, threads),
    )
    try:
        futures = [pool.submit(_run, batch) for batch in batches]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise CheckpointError(
            f"one of {processes} processes was killed, most likely for want of memory: the same "
            "command goes on where it stopped; give it fewer --processes or a smaller --batch_size"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None


def _start(job: Job, threads: int) -> None:
    """Make a process ready; Ctrl-C is its parent's matter."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _worker = Worker(job)


def _run(indices: list[int]) -> Batch:
    assert _worker is not None
    return _worker.run(indices)


def all_rows(batches: Iterable[Batch]) -> dict[tuple[int, str], Row]:
    """Return (clip, method) -> row; of a clip that was scored twice, the later row."""
    return {(row.index, row.method): row for batch in batches for row in batch.rows}
