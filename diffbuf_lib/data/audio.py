"""Read, write and resample audio files; every error names the file and what to do about it."""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from diffbuf_lib.data.reader import READABLE, AudioReader, reason
from diffbuf_lib.data.riff import make_plain_wav
from diffbuf_lib.errors import DataError, DiffbufError

EXTENSIONS = (".wav", ".flac")
# Integer type and number of significant bits of each PCM subtype that can be written.
_PCM: dict[str, tuple[Any, int]] = {"PCM_16": (np.int16, 16), "PCM_24": (np.int32, 24)}
_ENDLESS = 1 << 62  # samples: more than any file has


class AudioInfo(NamedTuple):
    """What the header of an audio file says: `sample_rate` in Hz, `frames` per channel."""

    path: Path
    sample_rate: int
    channels: int
    frames: int


def read_info(path: str | Path, *, decode: bool = False) -> AudioInfo:
    """Read an audio file's header, and its samples only if the header does not give their count.

    With `decode`, count the samples that can be decoded and warn if the header promises another
    number; without it, DataError if the file is cut short. Also if missing, empty or not audio.
    """
    path = Path(path)
    with AudioReader(path) as file:
        frames = file.frames
        if frames is None or (decode and not file.is_counted):
            state = path.stat()
            frames, is_cut, complaints = _decoded(path, state.st_size, state.st_mtime_ns)
        else:
            is_cut, file.position = file.is_cut, frames
            complaints = file.complaints()
        if decode:
            for line in complaints:
                warnings.warn(line, stacklevel=2)
        elif is_cut:
            raise DataError(f"{path} is cut short ({complaints[0]}): fetch or make it again")
        return AudioInfo(path, file.sample_rate, file.channels, frames)


@lru_cache(maxsize=1 << 16)
def _decoded(path: Path, size: int, changed: int) -> tuple[int, bool, list[str]]:
    """Decode a file (size and time key the cache); return its length, whether cut, complaints."""
    with AudioReader(path, repair=True) as file:
        for _ in file.blocks(1 << 16):
            pass
        file.repaired = 0
        return file.position, file.is_cut, file.complaints()


def read_audio(path: str | Path, start: int = 0, frames: int | None = None) -> tuple[Tensor, int]:
    """Read `frames` samples from `start` on, or all; in .wav and .flac only these are decoded.

    Returns [C, T] float32, full scale 1, and the sample rate in Hz. DataError as in `read_info`, or
    if the part lies outside the file, the file is cut short, or it holds NaN or Inf.
    """
    with AudioReader(path) as file:
        known = file.frames
        wanted = frames if frames is not None else 1 if known is None else known - start
        if start < 0 or wanted < 1 or (known is not None and start + wanted > known):
            has = f"{path} has {known or 'fewer'} samples, not {start} to {start + wanted}"
            raise DataError(f"{has}: ask for a part that it has")
        file.skip_to(start)
        to_the_end = frames is None and known is None
        samples = file.read(_ENDLESS if to_the_end else wanted)  # [T, C]
        if len(samples) < wanted or (frames is None and file.is_cut):
            promised = wanted if frames is not None else (file.promised or wanted) - start
            there = f"{len(samples)} of {promised} samples from {start} on can be decoded"
            raise DataError(f"{path} is cut short: {there}: fetch or make it again")
        return torch.from_numpy(np.ascontiguousarray(samples.T)), file.sample_rate


def write_audio(path: str | Path, wave: Tensor, sample_rate: int, subtype: str = "PCM_16") -> None:
    """Write a wave, [C, T] float of full scale 1, as a .wav or .flac file, atomically.

    The subtype is PCM_16, PCM_24 or (wav only) FLOAT. PCM samples are rounded to the nearest step
    of 2^(1 - bits); +1 becomes the largest step below. DataError for a wrong shape, extension or
    subtype; NaN or Inf; a PCM sample beyond full scale; or a full disk.
    """
    write_bytes(path, encode_audio(Path(path), wave, sample_rate, subtype), sync=False)


def encode_audio(path: Path, wave: Tensor, sample_rate: int, subtype: str) -> bytes:
    """Return the bytes that `write_audio` writes; `path` gives the format, and errors name it."""
    if wave.ndim != 2 or 0 in wave.shape:
        raise DataError(f"{path}: a wave of shape {tuple(wave.shape)} is not [channels, time]")
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(f"{path}: the file name must end in one of {', '.join(EXTENSIONS)}")
    samples = wave.detach().cpu().double().numpy().T  # [T, C]
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: the wave holds NaN or Inf and is not written: check its source")
    values = samples if subtype == "FLOAT" else _to_pcm(path, samples, subtype)
    content, kind = io.BytesIO(), path.suffix[1:].upper()
    try:
        soundfile.write(content, values, sample_rate, subtype=subtype, format=kind)
    except (soundfile.SoundFileError, ValueError) as error:
        what = f"{path} cannot be written as {subtype} at {sample_rate} Hz ({reason(error)})"
        raise DataError(f"{what}: use PCM_16, or a .wav file") from error
    return content.getvalue()


def _to_pcm(path: Path, samples: npt.NDArray[np.float64], subtype: str) -> npt.NDArray[np.integer]:
    """Round [T, C] float samples to integers; libsndfile itself would floor and clip them."""
    if subtype not in _PCM:
        raise DataError(f"{path}: subtype {subtype!r} is not one of {', '.join([*_PCM, 'FLOAT'])}")
    peak = float(np.abs(samples).max())
    if peak > 1:
        raise DataError(f"{path}: peak {peak:.4g} is above full scale 1: scale it, or write FLOAT")
    dtype, bits = _PCM[subtype]
    steps = np.minimum(np.round(samples * 2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1).astype(dtype)
    return steps << (8 * steps.itemsize - bits)


@contextmanager
def audio_output(
    path: Path, sample_rate: int, channels: int, *, atomic: bool = True
) -> Iterator[soundfile.SoundFile]:
    """Open a file to write to: a .wav of 32-bit floats, so that nothing clips, or a 24-bit .flac.

    Its folder is created. A .wav that is too large for its format becomes RF64. Without `atomic`
    (see `atomic_file`) the file grows in place. DataError for another extension, or a full disk.
    """
    formats = {".wav": ("RF64", "FLOAT"), ".flac": ("FLAC", "PCM_24")}
    if path.suffix.lower() not in formats:
        raise DataError(f"{path}: give a name that ends in .wav or .flac (stream: - for stdout)")
    kind, subtype = formats[path.suffix.lower()]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, sync=False) if atomic else nullcontext(path) as target:
            target.open("wb").close()  # created here, so that its mode follows the umask
            try:
                with soundfile.SoundFile(
                    os.fsencode(target), "w", sample_rate, channels, subtype, format=kind
                ) as file:
                    yield file
            finally:
                if kind == "RF64":
                    make_plain_wav(target, channels)


def refuse_same_file(source: Path, output: Path) -> None:
    """Raise DataError if the output is the input file itself, or a link to it."""
    if output.exists() and source.exists() and output.samefile(source):
        raise DataError(f"the output {output} is the input {source}: give it another name")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, with `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: str | Path, content: bytes, *, sync: bool = True) -> None:
    """Write all bytes of a file through `atomic_file`; DataError if that fails."""
    with writing(path), atomic_file(path, sync=sync) as temporary:
        temporary.write_bytes(content)


@contextmanager
def writing(
    path: str | Path,
    fails: type[Exception] = soundfile.SoundFileError,  # besides OSError
    makes: type[DiffbufError] = DataError,
    fix: str = "free disk space or choose another folder",
) -> Iterator[None]:
    """Turn an error while a file or folder is written into one of ours that names the path."""
    try:
        yield
    except (OSError, fails) as error:  # some libraries turn an OSError into one of theirs
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise makes(f"{path} cannot be written ({reason(cause)}): {fix}") from error


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; at the end, it replaces `path`.

    Whenever the process stops, `path` is the old file or the whole new one; with `sync`, even if
    the power fails. A link stays a link: the file it points to is replaced. Raises the system's
    OSError; the temporary file is then removed and `path` is unchanged.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if sync:
            wait_for_disk(temporary)
        os.replace(temporary, path)
        if sync:
            wait_for_disk(path.parent)  # otherwise a power failure can undo the rename
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def wait_for_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resample(wave: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Change the sample rate (Hz) of [C, T] float32 with soxr's high-quality band-limited filter.

    Returns [C, T'] float32 with T' = T * to_rate / from_rate, rounded up; `wave` itself if the
    rates are equal. DataError for a rate below 1 Hz.
    """
    if from_rate < 1 or to_rate < 1:
        raise DataError(f"cannot resample from {from_rate} Hz to {to_rate} Hz: rates start at 1 Hz")
    if from_rate == to_rate:
        return wave
    length = -(-wave.shape[-1] * to_rate // from_rate)
    samples = np.ascontiguousarray(wave.detach().cpu().float().numpy().T)  # [T, C]
    result = torch.from_numpy(soxr.resample(samples, from_rate, to_rate, quality="HQ").T)
    # soxr rounds the length to the nearest integer: make it T' with every version of soxr.
    return torch.nn.functional.pad(result, (0, length - result.shape[-1])).contiguous()


def check_rate(info: AudioInfo, expected: int) -> None:
    """Raise DataError for a file whose rate is not `expected`, Hz: nothing is resampled unasked."""
    if info.sample_rate != expected:
        what = f"{info.path} has {info.sample_rate} Hz, not audio.sample_rate = {expected}"
        copy = f"copy the data with `diffbuf data resample IN OUT --rate {expected}`"
        raise DataError(f"{what}: {copy}, or set audio.sample_rate={info.sample_rate}")


def list_audio(folder: str | Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """List the .wav and .flac files (or others) at any depth below a folder, sorted by path.

    Links to folders are followed (once each); names that begin with a dot are left out. DataError
    if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist: check the path")
    found, seen = list[Path](), set[str]()
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        real = os.path.realpath(here)
        if real in seen:  # a link back up: do not walk in circles
            folders.clear()
            continue
        seen.add(real)
        audio = (name for name in names if name.lower().endswith(extensions))
        found += [Path(here, name) for name in audio if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def output_names(root: Path, files: list[Path], kept: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """Return unique names relative to `root`; extensions that are not in `kept` become .wav."""
    names = [path.relative_to(root) for path in files]
    given = {name for name in names if name.suffix.lower() in kept}
    outputs = []
    for name in names:
        if name not in given:
            short = name.with_suffix(".wav")
            name = short if short not in given else name.with_name(f"{name.name}.wav")
            given.add(name)
        outputs.append(name)
    return outputs


def resample_folder(
    source: str | Path, out_path: str | Path, rate: int, *, progress: bool = False
) -> Path:
    """Copy a folder of any layout: the same tree, its audio as 32-bit float .wav at `rate` Hz.

    Other files are copied unchanged. An interrupted copy resumes when started again. DataError for
    a folder without audio, a copy inside the source, a damaged file, or a full disk.
    """
    source, out_path = Path(source), Path(out_path)
    if rate < 1:
        raise DataError(f"--rate {rate}: rates start at 1 Hz")
    files = list_audio(source, READABLE)
    if not files:
        raise DataError(f"{source} holds no audio file: check the path")
    if out_path.resolve().is_relative_to(source.resolve()):
        raise DataError(f"the copy {out_path} lies inside {source}: choose another folder")
    others = {path for path in source.rglob("*") if path.is_file()}.difference(files)
    names = [*output_names(source, files, kept=(".wav",)), *(p.relative_to(source) for p in others)]
    copies = list(zip([*files, *others], names, strict=True))
    with writing(out_path):
        for path, name in tqdm(copies, disable=not progress):
            target = out_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in others:
                with atomic_file(target, sync=False) as temporary:
                    shutil.copyfile(path, temporary)
            elif not (target.exists() and read_info(target).sample_rate == rate):
                wave, from_rate = read_audio(path)
                write_audio(target, resample(wave, from_rate, rate), rate, "FLOAT")
    return out_path
