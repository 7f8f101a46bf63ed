"""How fast clips come from a folder, from shards on the disk, and from shards over S3."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.s3 import RCLONE, serve_s3
from diffbuf_lib.config import Config
from diffbuf_lib.data import open_dataset, pack_folder, write_audio
from diffbuf_lib.training.feed import ClipReader

_CLIPS, _BATCH = 512, 32
_PACE = 50  # clips per second that training consumes


def bench_shards() -> Iterator[tuple[str, float, str, str]]:
    """Yield name, value, unit and note of every row."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        rng = np.random.default_rng(0)
        for i in range(_CLIPS):
            folder = root / "folder" / f"sample_{i:05}"
            folder.mkdir(parents=True)
            for name in ("mixture", "vocals"):
                wave = torch.from_numpy(rng.normal(size=(1, 16000)) * 0.1).clamp(-0.99, 0.99)
                write_audio(folder / f"{name}.wav", wave, 16000)
        pack_folder(root / "folder", root / "s3" / "bucket" / "shards", processes=1)
        for name, where in (("folder", "folder"), ("shards on disk", "s3/bucket/shards")):
            yield f"clips from {name}", _speed(str(root / where)), "clips/s", "pairs of 1 s, random"
        if RCLONE is None or find_spec("s3fs") is None:
            return
        with serve_s3(root / "s3") as env:
            os.environ.update(env)
            url = "s3://bucket/shards"
            yield "clips from S3", _speed(url, 0.0), "clips/s", f"loopback, {_BATCH} at a time"
            note = f"of the time at {_PACE} clips/s, one reader"
            yield "waiting for S3", 100 * _waiting(url), "%", note


def _open(where: str, cache_gb: float) -> Any:
    cfg = Config().override(f"data.cache_gb={cache_gb}")
    return open_dataset(1, where, cfg, training=True)


def _batches() -> list[list[int]]:
    order = np.random.default_rng(1).permutation(_CLIPS).tolist()
    return [order[i : i + _BATCH] for i in range(0, _CLIPS, _BATCH)]


def _speed(where: str, cache_gb: float = 10.0) -> float:
    dataset, begun = _open(where, cache_gb), time.perf_counter()
    for _ in ClipReader(dataset).read(_batches()):
        pass
    return _CLIPS / (time.perf_counter() - begun)


def _waiting(where: str) -> float:
    """Return the share of time that steps at a steady pace wait for their batch."""
    batches = ClipReader(_open(where, 0.0), num_workers=1).read(_batches())
    next(batches)  # the reader has started
    waited, begun = 0.0, time.perf_counter()
    while True:
        time.sleep(_BATCH / _PACE)
        asked = time.perf_counter()
        if next(batches, None) is None:
            return waited / (asked - begun)
        waited += time.perf_counter() - asked
