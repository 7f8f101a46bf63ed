"""The doctor's look at a dataset's files: can they be read, do they fit the config, are sets apart.

Facts come from `diffbuf_lib.data.audit`; here, and for the signals in `checks_signals`, they are
judged.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from diffbuf_lib.config import Config, describe_keys
from diffbuf_lib.data.audit import Audit, ClipFacts, audit, shared_targets
from diffbuf_lib.diagnostics.checks_signals import check_levels, check_signals, names_of
from diffbuf_lib.diagnostics.findings import Finding

_PADDING = 0.1  # share of a chunk


def check_data(cfg: Config, dataset: Any, valid_set: Any = None) -> Iterator[Finding]:
    """Look at a sample of the training and of the validation clips."""
    facts = audit(dataset)
    if not facts.size:
        yield empty_finding("training")
        return
    yield from _one_set(cfg, facts, dataset, "data")
    if valid_set is None:
        return
    if not len(valid_set):
        yield Finding(
            "warning",
            "valid.size",
            "the validation set holds no clip",
            value=0,
            limit=1,
            why="nothing is validated, and the best model is not kept",
            fix="check --valid_path",
        )
        return
    yield from _one_set(cfg, audit(valid_set, limit=24, seconds=1.0), valid_set, "valid")
    yield _shared(dataset, valid_set)


def error_finding(error: Exception, check: str, why: str) -> Finding:
    """Make a finding of one of this library's errors: after the last colon stands the fix."""
    message, colon, fix = str(error).rpartition(": ")
    key = next((key for key, *_ in describe_keys() if re.search(rf"\b{re.escape(key)}\b", fix)), "")
    found = re.search(r"\b([a-z_]+(?:\.[a-z_]+)+=\S+)", fix)
    return Finding(
        "error",
        check,
        message if colon else str(error),
        why=why,
        fix=fix if colon else "see the message",
        config_key=key,
        overrides=(found.group(1).rstrip(".,;"),) if found else (),
    )


def empty_finding(which: str) -> Finding:
    """Say that a set holds nothing."""
    return Finding(
        "error",
        "data.size",
        f"the {which} set holds no clip",
        value=0,
        limit=1,
        why="there is nothing to learn from",
        fix="check --data_path and --dataset_type",
    )


def _one_set(cfg: Config, facts: Audit, dataset: Any, room: str) -> Iterator[Finding]:
    readable = facts.readable
    sample = f"{len(facts.clips)} of {facts.size} clips looked at"
    yield from _broken(facts, room)
    if not readable:
        return
    shapes = Counter(tuple(clip.wave.shape) for clip in readable if clip.wave is not None)
    text = " and ".join(f"[{', '.join(map(str, shape))}]" for shape in sorted(shapes))
    yield Finding("ok", f"{room}.shape", f"clips are {text} ({sample})", value=text)
    yield from _channels(cfg, readable, room)
    yield from _padding(cfg, facts, dataset, room)
    yield from check_signals(readable, room)
    if room == "data":
        yield from check_levels(cfg, readable, dataset)


def _broken(facts: Audit, room: str) -> Iterator[Finding]:
    """One finding for each kind of unreadable clip; the first clip of a kind is quoted."""
    if not facts.broken:
        return
    kinds: dict[str, list[ClipFacts]] = {}
    for clip in facts.broken:
        fix = str(clip.error).rpartition(": ")[2]
        kinds.setdefault(fix, []).append(clip)
    for clips in kinds.values():
        error = clips[0].error
        assert error is not None
        finding = error_finding(error, f"{room}.files", "training stops when it comes to this clip")
        more = f" (and {len(clips) - 1} more of {len(facts.clips)})" if len(clips) > 1 else ""
        yield Finding(
            **{
                **finding.__dict__,
                "message": finding.message + more,
                "value": [clip.name for clip in clips],
            }
        )


def _channels(cfg: Config, clips: Sequence[ClipFacts], room: str) -> Iterator[Finding]:
    channels = {clip.name: clip.wave.shape[0] for clip in clips if clip.wave is not None}
    counts = Counter(channels.values())
    found = " and ".join(f"{n} of {count}" for count, n in sorted(counts.items()))
    if len(counts) > 1 and cfg.training.batch_size > 1:
        rare = min(counts, key=counts.__getitem__)
        odd = [clip for clip in clips if channels.get(clip.name) == rare]
        yield Finding(
            "error",
            f"{room}.channels",
            f"clips differ in channels ({found}): {names_of(odd)}",
            value=dict(counts),
            limit=1,
            why="clips of different shapes cannot be stacked into a batch",
            fix="convert the files to one number of channels, or set training.batch_size=1",
            config_key="training.batch_size",
            overrides=("training.batch_size=1",),
        )
    elif max(counts) > 1:
        yield Finding(
            "info",
            f"{room}.channels",
            f"clips have {max(counts)} channels, which are averaged to mono",
            value=dict(counts),
        )
    rates = {info.sample_rate for clip in clips for info in clip.infos}
    if rates == {cfg.audio.sample_rate}:
        yield Finding(
            "ok",
            f"{room}.sample_rate",
            f"files have {cfg.audio.sample_rate} Hz",
            value=cfg.audio.sample_rate,
            limit=cfg.audio.sample_rate,
            config_key="audio.sample_rate",
        )


def _padding(cfg: Config, facts: Audit, dataset: Any, room: str) -> Iterator[Finding]:
    """Say how much of the clips would be zeros after the end of short files."""
    lengths = [clip.infos[0].frames for clip in facts.readable if clip.infos]
    if not lengths:
        return
    chunk = cfg.audio.chunk_size
    padding = statistics.fmean(max(0, chunk - length) / chunk for length in lengths)
    span = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0])
    message = f"files have {span} samples, a chunk {chunk}: {padding:.0%} of a clip is padding"
    if padding > _PADDING:
        shorter = int(statistics.median(lengths))
        yield Finding(
            "warning",
            f"{room}.padding",
            message,
            value=padding,
            limit=_PADDING,
            why="the network learns from zeros that cost as much as speech",
            fix=f"lower audio.chunk_size to {shorter}, or use longer files",
            config_key="audio.chunk_size",
            overrides=(f"audio.chunk_size={shorter}",),
        )
    else:
        yield Finding(
            "ok", f"{room}.padding", message, value=padding, config_key="audio.chunk_size"
        )
    if room == "data" and facts.size < cfg.training.batch_size:
        yield Finding(
            "warning",
            "data.batches",
            f"{facts.size} clips are fewer than training.batch_size {cfg.training.batch_size}",
            value=facts.size,
            limit=cfg.training.batch_size,
            why="every step then sees the whole set",
            fix=f"lower training.batch_size to {facts.size}",
            config_key="training.batch_size",
            overrides=(f"training.batch_size={facts.size}",),
        )


def _shared(dataset: Any, valid_set: Any) -> Finding:
    """Look for validation clips that are training clips."""
    pairs = shared_targets(dataset, valid_set)
    both = len({other for _, other in pairs})
    if not both:
        return Finding("ok", "valid.duplicates", "no target of valid is in train", value=0, limit=0)
    return Finding(
        "warning",
        "valid.duplicates",
        f"{both} of {len(valid_set)} validation targets are in the training set too: "
        f"{pairs[0][1]} = {pairs[0][0]}",
        value=both,
        limit=0,
        why="validation then measures memory, and picks a model that has learnt by heart",
        fix="remove these clips from one of the two sets, or check --valid_path",
    )
