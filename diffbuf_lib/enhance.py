"""Enhance audio files of any rate and length, a block at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch

from diffbuf_lib.data.audio import list_audio, read_info
from diffbuf_lib.errors import DataError
from diffbuf_lib.live import output_format
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.streaming import OnlineEnhancer

BLOCK_SECONDS = 4.0
_Block = np.ndarray[Any, np.dtype[np.float32]]


def enhance_file(
    model: DiffusionBufferModel, source: str | Path, destination: str | Path, *, seed: int = 0
) -> None:
    """Enhance one file; memory does not grow with its length.

    Channels are averaged to mono, as in training; the output is mono, of the input's rate and
    length. A .wav is written as 32-bit float, so that nothing is clipped; a .flac as 24 bit.

    Args:
        model: any DiffusionBufferModel.
        source: a file that libsndfile reads.
        destination: .wav or .flac; written whole or not at all.
        seed: of the diffusion noise.

    Raises:
        DataError: a file that cannot be read or written, or that holds NaN.
    """
    info, destination = read_info(source), Path(destination)
    arguments = output_format(destination)
    enhancer = OnlineEnhancer(model, seed=seed)
    partial = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=destination.parent)
        os.close(handle)
        with soundfile.SoundFile(partial, "w", info.sample_rate, 1, **arguments) as out:
            for block in _enhanced(enhancer, model.cfg.audio.sample_rate, info.path):
                out.write(block)
        os.replace(partial, destination)
    except (OSError, soundfile.LibsndfileError) as error:
        raise DataError(f"{destination} cannot be written: {error}") from error
    finally:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)


def enhance_path(
    model: DiffusionBufferModel, source: str | Path, destination: str | Path, *, seed: int = 0
) -> Iterator[tuple[Path, Path]]:
    """Enhance a file, or every wav and flac file below a folder into a folder of the same shape.

    Yields:
        (input, output) of each file when it has been written.

    Raises:
        DataError: nothing to enhance, a destination inside the source folder, or as in
            `enhance_file`.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        enhance_file(model, source, destination, seed=seed)
        yield source, destination
        return
    if destination.resolve().is_relative_to(source.resolve()):
        raise DataError(
            f"the output {destination} lies inside the input {source}: choose another folder"
        )
    files = list_audio(source)
    if not files:
        raise DataError(f"{source} holds no .wav or .flac file: check the path")
    for path in files:
        target = destination / path.relative_to(source)
        enhance_file(model, path, target, seed=seed)
        yield path, target


def _enhanced(enhancer: OnlineEnhancer, model_rate: int, path: Path) -> Iterator[_Block]:
    """Yield the enhanced file in blocks [T] at its own rate, as many samples as it has."""
    with soundfile.SoundFile(path) as file:
        total, rate = file.frames, file.samplerate
        there = soxr.ResampleStream(rate, model_rate, 1, dtype="float32")  # exact if they are equal
        back = soxr.ResampleStream(model_rate, rate, 1, dtype="float32")
        given = 0
        blocks = file.blocks(int(BLOCK_SECONDS * rate), dtype="float32", always_2d=True)
        for block in chain(blocks, [None]):
            mono = np.zeros(0, np.float32) if block is None else block.mean(axis=1)
            if not np.isfinite(mono).all():
                raise DataError(f"{path} holds NaN or Inf samples: repair or remove the file")
            mono = there.resample_chunk(mono, last=block is None)
            ready = enhancer.push(torch.from_numpy(mono))
            if block is None:
                ready = torch.cat([ready, enhancer.flush()])
            out: _Block = back.resample_chunk(ready.numpy(), last=block is None)[: total - given]
            given += len(out)
            yield out
        yield np.zeros(total - given, np.float32)  # rounding of the two rates, a sample or so
