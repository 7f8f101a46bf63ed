"""Enhance audio files of any rate and length, a block at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soxr
import torch

from diffbuf_lib.data.audio import audio_output, list_audio, output_names, refuse_same_file
from diffbuf_lib.data.reader import CONVERTIBLE, READABLE, AudioReader, Block, ffmpeg_line
from diffbuf_lib.errors import DataError, DiffbufError
from diffbuf_lib.graph import Backend
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.streaming import OnlineEnhancer

BLOCK_SECONDS = 4.0
QUIET = 0.1  # peak, full scale 1, at which models without a level lost 3.6 dB SI-SDR


class FilesFailedError(DataError):
    """Files of a folder that could not be enhanced; the others are done."""


def enhance_file(
    model: DiffusionBufferModel,
    source: str | Path,  # a file that libsndfile reads
    destination: str | Path,  # .wav or .flac
    *,
    seed: int = 0,  # of the diffusion noise
    channels: Literal["mono", "keep"] = "mono",  # average them, as in training, or enhance each
    repair: bool = False,  # take NaN and Inf as zeros instead of refusing the file
    backend: Backend = "torch",  # as in `OnlineEnhancer`
) -> None:
    """Enhance one file; memory does not grow with its length.

    The output has the input's rate and length, and is written completely or not at all: a .wav of
    32-bit floats, so that nothing is clipped, or a .flac of 24 bits. If the header disagrees with
    the samples that can be decoded, these are used, with a warning. Raises DataError for a file
    that cannot be read or written, or that holds NaN.
    """
    source, destination = Path(source), Path(destination)
    refuse_same_file(source, destination)
    with AudioReader(source, repair=repair) as file:
        streams = file.channels if channels == "keep" else 1
        enhancer = OnlineEnhancer(model, seed=seed, batch=streams, backend=backend)
        with audio_output(destination, file.sample_rate, streams) as out:
            for block in _enhanced(enhancer, model.cfg.audio.sample_rate, file):
                out.write(block)
        file.warn()
    if model.level is None and 0 < file.peak < QUIET:
        peak, enough = (20 * math.log10(x) for x in (file.peak, QUIET))
        what = f"{source}: its peak is {peak:.0f} dB re full scale; this model, trained without "
        what += "preprocessing.level_seconds, expects louder signals: amplify it to"
        warnings.warn(f"{what} {enough:.0f} dB or more", stacklevel=2)


def enhance_path(
    model: DiffusionBufferModel,
    source: str | Path,
    destination: str | Path,
    *,
    overwrite: bool = False,
    **options: Any,
) -> Iterator[tuple[Path, Path]]:
    """Enhance a file, or all files below a folder that libsndfile reads, keeping their layout.

    In a folder, existing outputs are replaced only with `overwrite`, a file that fails does not
    stop the others, and all but .flac become .wav. A warning tells of other files that look like
    audio. Options as in `enhance_file`. Yields (input, output) of each file written. Raises
    DataError if there is nothing to enhance, an output already exists or the destination is inside
    the source; FilesFailedError, with the reasons, at the end.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        refuse_same_file(source, destination)
        if destination.exists() and not overwrite:
            raise DataError(f"{destination} already exists: give another name, or --overwrite")
        enhance_file(model, source, destination, **options)
        yield source, destination
        return
    if destination.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{destination} lies inside the input {source}: choose another folder")
    left_out = list_audio(source, CONVERTIBLE)
    if left_out:
        what = f"{len(left_out)} files that cannot be read are left out, such as {left_out[0]}"
        warnings.warn(f"{what}: convert them, as with {ffmpeg_line(left_out[0])}", stacklevel=2)
    files = list_audio(source, READABLE)
    if not files:
        raise DataError(f"{source} holds no .wav, .flac or other file to read: check the path")
    targets = [destination / name for name in output_names(source, files)]
    there = {target for target in targets if target.exists()} if not overwrite else set()
    if there:
        what = f"{len(there)} of {len(files)} outputs are there already and are kept"
        warnings.warn(f"{what}: --overwrite makes them again", stacklevel=2)
    failed = []
    for path, target in zip(files, targets, strict=True):
        if target in there:
            continue
        try:
            enhance_file(model, path, target, **options)
        except DiffbufError as error:
            failed.append(str(error))
        else:
            yield path, target
    if failed:
        lines = "".join(f"\n  {reason}" for reason in failed)
        raise FilesFailedError(f"{len(failed)} of {len(files)} files could not be enhanced:{lines}")


def _enhanced(enhancer: OnlineEnhancer, model_rate: int, file: AudioReader) -> Iterator[Block]:
    """Yield the enhanced file in blocks [T, C] at its own rate, as many samples as it has."""
    rate, streams = file.sample_rate, enhancer.batch
    there = soxr.ResampleStream(rate, model_rate, streams, dtype="float32")  # exact if equal
    back = soxr.ResampleStream(model_rate, rate, streams, dtype="float32")
    given = 0
    blocks = file.blocks(int(BLOCK_SECONDS * rate), mono=streams < file.channels)
    for block in chain(blocks, [None]):
        samples = np.zeros((0, streams), np.float32) if block is None else block
        samples = there.resample_chunk(samples, last=block is None)
        ready = enhancer.push(torch.from_numpy(np.ascontiguousarray(samples.T)))
        if block is None:
            ready = torch.cat([ready, enhancer.flush().reshape(streams, -1)], dim=1)
        out = back.resample_chunk(np.ascontiguousarray(ready.numpy().T), last=block is None)
        out = out[: file.position - given]
        given += len(out)
        yield out
    # Resampling twice may round off a sample or so.
    yield np.zeros((file.position - given, streams), np.float32)
