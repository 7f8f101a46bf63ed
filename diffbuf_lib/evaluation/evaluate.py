"""Enhance clips by a model and by what it is compared with, and score them.

`evaluate` scores a model in memory, for a notebook or the demo; `diffbuf evaluate` writes a folder
(see `results`). Both use `Evaluator`.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data import ClipDataset, DNLMDataset, open_dataset, read_audio, read_info
from diffbuf_lib.data.audio import text_of
from diffbuf_lib.errors import DataError
from diffbuf_lib.evaluation.baselines import NOISY, make_baselines
from diffbuf_lib.evaluation.scores import Scores, check_scoring, score
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training.feed import Stream, example_generators
from diffbuf_lib.training.metrics import SILENCE_RMS

OURS = "diffbuf"
"""What the evaluated model is called among the methods."""


@dataclass(frozen=True)
class Clip:
    """One clip, averaged to mono."""

    index: int  # its place in the dataset
    name: str  # of its file or folder, below the dataset's root
    mix: Tensor  # [T] float32, full scale 1, the noisy signal
    target: Tensor  # [T] float32, the clean signal

    @property
    def snr(self) -> float | None:
        """10 log10 of the energies of target and mix - target, dB; None if either is silent."""
        speech, noise = self.target.double(), (self.mix - self.target).double()
        if min(wave.square().mean().sqrt() for wave in (speech, noise)) < SILENCE_RMS:
            return None
        ratio = float(speech.square().sum() / noise.square().sum())
        return round(10 * math.log10(ratio), 3) if 0 < ratio < math.inf else None

    @property
    def checksum(self) -> str:
        """12 hexadecimal digits of its samples: equal clips have equal ones, wherever they lie."""
        digest = hashlib.sha256(self.mix.contiguous().numpy().tobytes())
        digest.update(self.target.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class ScoredClip(Clip):
    """A clip as every method left it; the noisy input is a method too."""

    estimates: dict[str, Tensor]  # method -> [T], aligned with mix
    scores: dict[str, Scores]

    @property
    def estimate(self) -> Tensor:
        """[T], what the model made of it."""
        return self.estimates[OURS]

    @property
    def noisy(self) -> dict[str, float]:
        """Every score of mix; NaN where it is undefined."""
        return {metric: self.scores[NOISY][metric] for metric in self.scores[NOISY].seconds}

    @property
    def enhanced(self) -> dict[str, float]:
        """Every score of estimate; NaN where it is undefined."""
        return {metric: self.scores[OURS][metric] for metric in self.scores[OURS].seconds}


def evaluate(
    model: DiffusionBufferModel,
    dataset: ClipDataset,
    metrics: Sequence[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    limit: int | None = None,
) -> Iterator[ScoredClip]:
    """Enhance and score clip after clip, in batches.

    Args:
        model: any DiffusionBufferModel, on any device.
        dataset: clips; opened with training=False.
        metrics: names in `scores.METRICS`.
        batch_size: clips enhanced at a time; does not change the estimates.
        seed: of the diffusion noise.
        limit: only the first clips.

    Raises:
        DataError: a clip that cannot be read, or a limit below 1.
        ConfigError, MissingExtraError: a metric that is unknown or unavailable.
    """
    evaluator = Evaluator(model, Clips(dataset, limit=limit), metrics, seed=seed)
    indices = evaluator.clips.indices
    for start in range(0, len(indices), batch_size):
        yield from evaluator.run(indices[start : start + batch_size])


@dataclass(frozen=True)
class MeanGain:
    """A metric's means over the clips for which it is defined before and after."""

    metric: str
    noisy: float  # mean of the mixtures; NaN if no clip has a score
    enhanced: float  # mean of the estimates
    scored: int  # clips that the means are over
    clips: int  # clips that there were

    @property
    def gain(self) -> float:
        """Enhanced minus noisy, in the metric's unit."""
        return self.enhanced - self.noisy


def summary(clips: Sequence[ScoredClip], metrics: Sequence[str]) -> list[MeanGain]:
    """Average over clips, a row a metric; a clip without a score on either side is left out."""
    rows = []
    for metric in metrics:
        pairs = [(clip.noisy[metric], clip.enhanced[metric]) for clip in clips]
        defined = [pair for pair in pairs if not math.isnan(sum(pair))]
        means = torch.tensor(defined, dtype=torch.float64).reshape(-1, 2).mean(0)
        noisy, enhanced = means.tolist()
        rows.append(MeanGain(metric, noisy, enhanced, len(defined), len(clips)))
    return rows


class Evaluator:
    """Enhances and scores clips. What it finds of a clip does not depend on those beside it.

    Args:
        model: any DiffusionBufferModel, on any device.
        clips: what is enhanced.
        metrics: names in METRICS, or dnsmos.
        baselines: names in BASELINES, or noisy, which is always there.
        delay: d, frames, of a data-prediction model; None for B.
        seed: of the diffusion noise.

    Raises:
        ConfigError, MissingExtraError: a metric, baseline or delay that is unknown or unavailable.
    """

    def __init__(
        self,
        model: DiffusionBufferModel,
        clips: Clips,
        metrics: Sequence[str],
        *,
        baselines: Sequence[str] = (),
        delay: int | None = None,
        seed: int = 0,
    ) -> None:
        model.sampler(delay)  # refuses a delay before any work is done
        self.metrics = check_scoring(metrics, clips.rate)
        self.model, self.clips = model, clips
        self.baselines = make_baselines(baselines)
        self.delay, self.seed = delay, seed
        self.seconds: dict[str, float] = defaultdict(float)
        """Kind of work (reading, a method, a metric) -> time spent on it so far."""

    @property
    def methods(self) -> list[str]:
        """All that is scored, in the order of tables."""
        return [NOISY, *self.baselines, OURS]

    def run(self, indices: Sequence[int]) -> list[ScoredClip]:
        """Read, enhance and score clips.

        Raises:
            DataError: a file that cannot be read.
        """
        with self._timed("reading"):
            clips = [self.clips[i] for i in indices]
        found = dict(self.estimates(clips))
        scored = []
        for place, clip in enumerate(clips):
            estimates = {method: waves[place] for method, waves in found.items()}
            scores = {method: self._score(clip, wave) for method, wave in estimates.items()}
            scored.append(ScoredClip(**vars(clip), estimates=estimates, scores=scores))
        return scored

    def estimates(self, clips: Sequence[Clip]) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield every method with its estimates [T], in the order of clips."""
        yield NOISY, [clip.mix for clip in clips]
        for name, baseline in self.baselines.items():
            with self._timed(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # another package's, about its own insides
                found = [baseline(clip.mix, self.clips.rate) for clip in clips]
            yield name, found
        with self._timed(OURS):
            found = self._enhance(clips)
        yield OURS, found

    def _enhance(self, clips: Sequence[Clip]) -> list[Tensor]:
        device = next(self.model.parameters()).device
        generators = clip_generators([clip.index for clip in clips], self.seed, device)
        # Silence behind a shorter clip is what a stream's end is: it changes no sample before.
        waves = [clip.mix for clip in clips]
        mix = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True).unsqueeze(1)  # [B, 1, T]
        out = self.model.enhance(mix.to(device), generators, self.delay)[:, 0].cpu()
        return [wave[: len(clip.mix)].clone() for wave, clip in zip(out, clips, strict=True)]

    def _score(self, clip: Clip, estimate: Tensor) -> Scores:
        scores = score(estimate, clip.target, self.clips.rate, self.metrics)
        for metric, spent in scores.seconds.items():
            self.seconds[metric] += spent
        return scores

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun


class Clips:
    """A dataset, opened with training=False, read clip by clip.

    Args:
        dataset: gives clips of its chunk size, or with `whole` the names of pairs of files.
        whole: read whole files, of at most `at_most` samples if that is given.
        at_most: samples.
        limit: only the first so many clips.

    Raises:
        DataError: limit is not above 0, or a file that cannot be read.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        *,
        whole: bool = False,
        at_most: int | None = None,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise DataError(f"--limit {limit} leaves no clip: give 1 or more")
        self.dataset, self.whole, self.rate = dataset, whole, dataset.sample_rate
        self.indices = range(min(len(dataset), limit or len(dataset)))
        self.names = [self._name(i) for i in self.indices]
        self.lengths = [dataset.chunk_size for _ in self.indices]
        if whole:
            pairs = (
                [read_info(path, decode=True) for path in dataset.items[i]] for i in self.indices
            )
            frames = [dataset.check_pair(*pair) for pair in pairs]
            self.lengths = [min(length, at_most or length) for length in frames]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Clip:
        """Read clip `i`; DataError if a file cannot be read or the two do not match."""
        if self.whole:
            mix, target = (
                read_audio(path, 0, self.lengths[i])[0] for path in self.dataset.items[i]
            )
        else:
            mix, target = self.dataset[i]
        return Clip(i, self.names[i], mix.mean(0), target.mean(0))

    def batches(self, clips: int, seconds: float = 100.0) -> list[list[int]]:
        """Split the clips into batches of like lengths, shortest first.

        Args:
            clips: in a batch at most.
            seconds: of audio in a batch at most; a longer clip is a batch of its own.
        """
        batches: list[list[int]] = [[]]
        for i in sorted(self.indices, key=lambda i: self.lengths[i]):
            padded = (len(batches[-1]) + 1) * self.lengths[i]  # the newest is the longest
            if batches[-1] and (len(batches[-1]) == clips or padded > seconds * self.rate):
                batches.append([])
            batches[-1].append(i)
        return batches

    def _name(self, i: int) -> str:
        path = self.dataset.items[i][0].relative_to(self.dataset.root)
        if isinstance(self.dataset, DNLMDataset):
            return text_of(path.parent)
        return text_of(Path(*(path.parts[1:] or path.parts)))  # without noisy/ or speech/


def open_clips(
    dataset_type: int,
    root: str | Path,
    cfg: Config,
    seconds: float | None = None,
    limit: int | None = None,
) -> Clips:
    """Open a dataset folder (as in training) for evaluation: whole files, where they are pairs.

    Args:
        dataset_type: 1, 2 or 3. Clips of type 3 are mixed when read: audio.chunk_size long.
        root: the dataset's folder.
        cfg: the model's config; its rate is the one that files must have.
        seconds: length of a clip at most.
        limit: only the first so many clips.

    Raises:
        DataError: as in `open_dataset`; or `seconds` or `limit` is not above 0.
    """
    at_most = None
    if seconds is not None:
        if not 1 <= seconds * cfg.audio.sample_rate < math.inf:
            raise DataError(f"--seconds {seconds} is no length of a clip: give seconds above 0")
        at_most = round(seconds * cfg.audio.sample_rate)
        # Only audio is read here, so a clip may be shorter than the model's buffer.
        audio = cfg.audio.model_copy(update={"chunk_size": at_most})
        cfg = cfg.model_copy(update={"audio": audio})
    dataset = open_dataset(dataset_type, root, cfg, training=False)
    return Clips(dataset, whole=dataset_type != 3, at_most=at_most, limit=limit)


def clip_generators(
    indices: Sequence[int], seed: int, device: torch.device
) -> list[torch.Generator]:
    """Return a source of diffusion noise a clip: the same whatever batch the clip is in."""
    return example_generators([(i,) for i in indices], seed, Stream.VALID, device)
