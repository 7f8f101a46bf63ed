"""The doctor's look at data: can files be read, do they fit the config, do they hold speech.

`audit` measures a sample of the files themselves, not of the crops that training draws from them;
`check_data` judges what it found.
"""

from __future__ import annotations

import filecmp
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import EXTENSIONS, read_audio, read_info
from diffbuf_lib.data.datasets import ClipDataset, DNLMDataset, MixingDataset
from diffbuf_lib.data.mixing import SILENCE_PEAK
from diffbuf_lib.diagnostics.findings import Finding, Severity, from_error, judge
from diffbuf_lib.diffusion.level import RunningLevel
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.errors import DataError
from diffbuf_lib.training.feed import clip_error

_FULL_SCALE = 0.999  # samples from here on count as clipped
_LONGEST = 30  # seconds of a file that are read
_HEAD = 4096  # bytes of a file that are compared before the whole of it is
_NAMED = 3  # clips that a message names before it only counts
_PADDING = 0.1  # share of a chunk
_SNR = (-40.0, 30.0)  # dB
_LEVEL = (0.2, 5.0)  # RMS of |S| over sigma's maximum; speech of peak 1 has about 0.6
_GOOD_LEVEL = 0.5


class WaveFacts(NamedTuple):
    """Numbers of one signal, full scale 1; peak, rms and dc are of the finite samples."""

    peak: float  # largest magnitude
    rms: float  # root mean square
    dc: float  # mean, of the channel where it is largest in magnitude
    offset: float  # magnitude of dc over rms; 0 for silence
    clipped: float  # share of samples at full scale or above, 0 to 1
    nonfinite: int  # samples that are NaN or Inf
    silent: bool  # no sample rises above 16-bit rounding


class ClipFacts(NamedTuple):
    """What was measured of one item of a dataset."""

    name: str  # files of the item
    frames: int | None  # samples of its first file; None for a clip without files
    mix: WaveFacts
    target: WaveFacts
    snr_db: float  # target over mix - target
    residual_db: float | None  # mix - target - noise over target, where there is a noise.wav
    noisy: Tensor  # [C, T] float32, as training would read it
    wave: Tensor  # [C, T] float32, the target


class Audit(NamedTuple):
    """A sample of a dataset of `size` clips."""

    size: int
    clips: list[ClipFacts]
    broken: dict[str, DataError]  # by name, why a clip cannot be read


def audit(dataset: Any, limit: int = 64, seconds: float = 2.0) -> Audit:
    """Measure up to `limit` clips spread evenly over a dataset: whole files of a `ClipDataset`.

    No clip is begun after `seconds` of wall time.
    """
    facts, deadline = Audit(len(dataset), [], {}), time.monotonic() + seconds
    count = min(facts.size, limit)
    # Every eighth comes first, so that a sample cut short still spans the set.
    for i in sorted(range(count), key=lambda i: i % 8):
        if (facts.clips or facts.broken) and time.monotonic() > deadline:
            break
        index = i * facts.size // count
        name = dataset.name(index) if hasattr(dataset, "name") else f"clip {index}"
        try:
            facts.clips.append(_read_clip(dataset, index, name))
        except Exception as error:
            facts.broken[name] = clip_error(name, error)
    return facts


def _read_clip(dataset: Any, index: int, name: str) -> ClipFacts:
    files: Sequence[Path] = dataset.items[index] if isinstance(dataset, ClipDataset) else ()
    frames = read_info(files[0]).frames if files else None
    mix, target = pair = dataset[index]  # raises if the pair does not match
    residual = None
    if len(files) == 2:
        mix, target = (_read_whole(path) for path in files)
        length = min(mix.shape[-1], target.shape[-1])  # data.pair_tolerance
        mix, target = mix[..., :length], target[..., :length]
    if isinstance(dataset, DNLMDataset):
        beside = (files[0].with_name(f"noise{extension}") for extension in EXTENSIONS)
        noise = next((_read_whole(path) for path in beside if path.is_file()), None)
        if noise is not None and noise.shape == mix.shape:
            residual = _ratio_db(mix - target - noise, target)
    snr = _ratio_db(target, mix - target)
    return ClipFacts(name, frames, measure(mix), measure(target), snr, residual, *pair)


def _read_whole(path: Path) -> Tensor:
    """Read a file, or the beginning of a very long one."""
    info = read_info(path)
    return read_audio(path, 0, min(info.frames, _LONGEST * info.sample_rate))[0]


def _ratio_db(wave: Tensor, other: Tensor) -> float:
    """Return the power of one wave over that of another in dB; -inf for silence over silence."""
    ratio = wave.double().square().mean() / other.double().square().mean()
    return float(10 * ratio.nan_to_num(0.0, posinf=math.inf).log10())


def measure(wave: Tensor) -> WaveFacts:
    """Measure a signal [C, T], full scale 1."""
    clean = wave.double().nan_to_num(0.0, 0.0, 0.0)
    peak = float(clean.abs().max())
    rms = float(clean.square().mean().sqrt())
    dc = max(clean.mean(dim=-1).tolist(), key=abs)
    silent = peak < SILENCE_PEAK
    return WaveFacts(
        peak=peak,
        rms=rms,
        dc=dc,
        offset=0.0 if silent else abs(dc) / rms,
        clipped=float((clean.abs() >= _FULL_SCALE).double().mean()),
        nonfinite=int((~wave.isfinite()).sum()),
        silent=silent,
    )


def shared_targets(first: Any, second: Any) -> list[tuple[str, str]]:
    """Return the pairs of clips, one of each set, whose target files hold the same bytes.

    Only the files of `ClipDataset`s are known; after two seconds no further file is compared.
    """
    sets = (each.items if isinstance(each, ClipDataset) else () for each in (first, second))
    targets, others = ([files[-1] for files in items if files] for items in sets)
    heads: dict[Any, list[Path]] = defaultdict(list)
    for path in others:
        heads[_head(path)].append(path)
    deadline = time.monotonic() + 2
    return [
        (str(path), str(other))
        for path in takewhile(lambda _: time.monotonic() < deadline, targets)
        for other in heads.get(_head(path), ())
        if filecmp.cmp(path, other, shallow=False)
    ]


def _head(path: Path) -> tuple[int, bytes]:
    """Return size and some bytes from the middle of a file, where speech is."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size // 2 - _HEAD // 2))
            return size, file.read(_HEAD)
    except OSError:
        return -1, bytes(path)  # equal to no other file's


def check_data(cfg: Config, dataset: Any, valid_set: Any = None) -> Iterator[Finding]:
    """Look at a sample of the training and of the validation clips."""
    facts = audit(dataset)
    if not facts.size:
        yield judge("data.size", 0, 1, bad=True)
        return
    yield from _check_set(cfg, facts, "data")
    if facts.size < cfg.training.batch_size:
        yield judge("data.batches", facts.size, cfg.training.batch_size, bad=True)
    snrs = [clip.snr_db for clip in facts.clips if abs(clip.snr_db) < 200]
    if snrs:
        value = {"min": min(snrs), "median": median(snrs), "max": max(snrs)}
        check = "data.snr/mixing" if isinstance(dataset, MixingDataset) else "data.snr"
        yield judge(check, value, _SNR, bad=not _SNR[0] <= value["median"] <= _SNR[1])
    yield from _check_level(cfg, facts.clips)
    if valid_set is not None and not len(valid_set):
        yield judge("valid.size", 0, 1, bad=True)
    elif valid_set is not None:
        yield from _check_set(cfg, audit(valid_set, limit=24, seconds=1.0), "valid")
        pairs = shared_targets(dataset, valid_set)
        both = len({other for _, other in pairs})
        names = f": {pairs[0][1]} = {pairs[0][0]}" if pairs else ""
        yield judge("valid.duplicates", both, 0, both > 0, count=len(valid_set), names=names)


# Check, a number measured on a clip (None if it does not apply), its limit, and the share of clips
# above that limit from which on the finding is an error.
_RULES: tuple[tuple[str, Callable[[ClipFacts], float | None], float, float], ...] = (
    ("silence", lambda clip: float(clip.target.silent), 0, 0.5),
    ("nonfinite", lambda clip: max(clip.mix.nonfinite, clip.target.nonfinite), 0, 0),
    ("clipping", lambda clip: max(clip.mix.clipped, clip.target.clipped), 1e-3, math.inf),
    ("dc", lambda clip: max(clip.mix.offset, clip.target.offset), 0.1, math.inf),
    # 16-bit rounding of three files stays far below -20 dB
    ("mixture", lambda clip: None if clip.target.silent else clip.residual_db, -20.0, 0.5),
    ("noise", lambda clip: clip.snr_db, 100.0, 0.5),
)


def _check_set(cfg: Config, sample: Audit, split: str) -> Iterator[Finding]:
    """Judge one set; `split` is "data" or "valid", the first part of the findings' names."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, error in sample.broken.items():
        kinds[str(error).rpartition(": ")[2]].append(name)
    looked_at = len(sample.clips) + len(sample.broken)
    for names in kinds.values():  # of each kind the first clip is quoted
        why = f"training stops at such a clip ({len(names)} of the {looked_at} looked at)"
        yield replace(from_error(sample.broken[names[0]], f"{split}.files", why), value=names)
    if not sample.clips:
        return
    shapes = " and ".join(sorted({str(list(clip.wave.shape)) for clip in sample.clips}))
    yield judge(f"{split}.shape", shapes, seen=looked_at, size=sample.size)
    yield from _check_format(cfg, sample.clips, split)
    for check, number_of, limit, error_from in _RULES:
        numbers = [(n, clip) for clip in sample.clips if (n := number_of(clip)) is not None]
        if not numbers:
            continue
        over = [clip for number, clip in numbers if number > limit]
        severe: Severity = "error" if len(over) >= error_from * len(numbers) else "warning"
        facts: dict[str, Any] = {"over": len(over), "count": len(numbers), "names": _names(over)}
        value = max(number for number, _ in numbers)
        yield judge(f"{split}.{check}", value, limit, bool(over) and severe, **facts)


def _names(clips: Sequence[ClipFacts]) -> str:
    return f": {', '.join(clip.name for clip in clips[:_NAMED])}" if clips else ""


def _check_format(cfg: Config, clips: Sequence[ClipFacts], split: str) -> Iterator[Finding]:
    """Judge channels, and how much of the clips is zeros after short files."""
    counts = Counter(clip.wave.shape[0] for clip in clips)
    if len(counts) > 1 and cfg.training.batch_size > 1:
        found = " and ".join(f"{n} of {count}" for count, n in sorted(counts.items()))
        odd = [clip for clip in clips if clip.wave.shape[0] == counts.most_common()[-1][0]]
        check = f"{split}.channels"
        yield judge(check, dict(counts), 1, True, found=found, names=_names(odd))
    elif max(counts) > 1:
        yield judge(f"{split}.channels/many", max(counts))
    lengths = [clip.frames for clip in clips if clip.frames is not None]
    if lengths:
        chunk, middle = cfg.audio.chunk_size, int(median(lengths))
        padding = fmean(max(0, chunk - length) / chunk for length in lengths)
        facts = {"shortest": min(lengths), "longest": max(lengths), "middle": middle, "cfg": cfg}
        yield judge(f"{split}.padding", padding, _PADDING, padding > _PADDING, **facts)


def _check_level(cfg: Config, clips: Sequence[ClipFacts]) -> Iterator[Finding]:
    """Compare the spectrum, as the network gets it, with the noise that diffusion adds to it.

    DN-LM attenuates speech by 1 / distance and then scales the mixture to full scale, so that |S|
    can lie far below sigma: what the score has to tell apart is then mostly the model's own noise.
    """
    compression, buffer = cfg.preprocessing.magnitude_compression, cfg.diffusion_buffer
    pairs = [torch.stack([c.noisy.mean(0), c.wave.mean(0)]) for c in clips if not c.target.silent]
    pairs = [p for p in pairs if p.shape == pairs[0].shape and p.isfinite().all() and p[1].any()]
    times = torch.linspace(buffer.t_eps, buffer.t_max, 200, dtype=torch.float64)
    sigma = float(make_sde(cfg.sde).std(times).max())
    if not pairs or not sigma:
        return
    spectral = Spectral.from_config(cfg.audio.stft, compression)
    Y, S = (spectral(waves) for waves in torch.stack(pairs, dim=1))
    if level := RunningLevel.from_config(cfg, spectral):
        S = S / level.scale(level.of_whole(Y)).unsqueeze(1)
    power = S.abs().square().mean(dim=1)  # [N, K]
    sounding = (power > 0).sum(dim=1).clamp_min(1)  # [N]: frames of zero padding do not count
    rms = median((power.sum(dim=1) / sounding).sqrt().tolist())
    ratio = rms / sigma
    beta = float(f"{compression.beta * _GOOD_LEVEL / ratio:.2g}")
    bad = not _LEVEL[0] <= ratio < _LEVEL[1]
    yield judge("data.level", ratio, _LEVEL, bad=bad, level=rms, sigma=sigma, beta=beta)
