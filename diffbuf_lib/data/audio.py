"""Read, write and resample one audio file; every error names the file and what to do about it."""

from __future__ import annotations

import io
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor

from diffbuf_lib.errors import DataError

EXTENSIONS = (".wav", ".flac")
# Integer sample type, bits that count, and left shift of each PCM subtype that is written.
_PCM: dict[str, tuple[type[np.signedinteger], int, int]] = {
    "PCM_16": (np.int16, 16, 0),
    "PCM_24": (np.int32, 24, 8),
}
# A RIFF size from here on is a placeholder of a program that wrote to a pipe, not a length.
_RIFF_SIZE_UNKNOWN = 0x7FFFF000


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says: `sample_rate` in Hz, `frames` per channel."""

    path: Path
    sample_rate: int
    channels: int
    frames: int


def read_info(path: str | Path) -> AudioInfo:
    """Read the header of a .wav or .flac file, without its samples.

    Raises:
        DataError: the file is missing, empty, no audio, or shorter than its header says.
    """
    with _open(Path(path)) as file:
        return AudioInfo(Path(path), file.samplerate, file.channels, file.frames)


def read_audio(path: str | Path, start: int = 0, frames: int | None = None) -> tuple[Tensor, int]:
    """Read samples from a .wav or .flac file; only the requested part is decoded.

    Args:
        path: the file.
        start: first sample to read.
        frames: samples to read; None reads to the end.

    Returns:
        wave: [C, T] float32, full scale 1; and the sample rate in Hz.

    Raises:
        DataError: as in `read_info`; or the part lies outside the file, the file is cut short, or
            it holds NaN or Inf.
    """
    path = Path(path)
    with _open(path) as file:
        wanted = file.frames - start if frames is None else frames
        if start < 0 or wanted < 1 or start + wanted > file.frames:
            raise DataError(
                f"{path} has {file.frames} samples, so samples {start} to {start + wanted} cannot "
                "be read: make the file again, or ask for a part that it has"
            )
        try:
            file.seek(start)
            samples = file.read(wanted, dtype="float32", always_2d=True)  # [T, C]
        except (soundfile.SoundFileError, OSError, MemoryError, ValueError) as error:
            # MemoryError: a header that promises terabytes
            raise DataError(
                f"{path} is damaged or cut short ({_reason(error)}): fetch or make it again"
            ) from error
        rate = file.samplerate
    if len(samples) != wanted:
        raise DataError(
            f"{path} is cut short: {len(samples)} of {wanted} samples from sample {start} could "
            "be decoded: fetch or make it again"
        )
    if bad := int(np.count_nonzero(~np.isfinite(samples))):
        raise DataError(f"{path} holds {bad} NaN or Inf samples: make the file again")
    return torch.from_numpy(np.ascontiguousarray(samples.T)), rate  # [C, T]


def write_audio(path: str | Path, wave: Tensor, sample_rate: int, subtype: str = "PCM_16") -> None:
    """Write an audio file atomically.

    PCM samples are rounded to the nearest step of 2^(1 - bits); +1 becomes the largest step below.

    Args:
        path: a .wav or .flac file; its folder must exist.
        wave: [C, T] float, full scale 1.
        sample_rate: Hz.
        subtype: "PCM_16", "PCM_24" or (wav only) "FLOAT".

    Raises:
        DataError: a wrong shape, extension or subtype; NaN or Inf; a PCM sample beyond full scale
            (scale the wave down, or write "FLOAT"); or the disk is full.
    """
    path = Path(path)
    if wave.ndim != 2 or 0 in wave.shape:
        raise DataError(
            f"{path}: a wave of shape {tuple(wave.shape)} cannot be written: give [channels, time]"
        )
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(f"{path}: the file name must end in one of {', '.join(EXTENSIONS)}")
    samples = wave.detach().cpu().double().numpy().T  # [T, C]
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: the wave holds NaN or Inf, so it is not written: check its maker")
    values = samples if subtype == "FLOAT" else _to_pcm(path, samples, subtype)
    content = io.BytesIO()
    try:
        kind = path.suffix[1:].upper()
        soundfile.write(content, values, sample_rate, subtype=subtype, format=kind)
    except (soundfile.SoundFileError, ValueError) as error:
        raise DataError(
            f"{path} cannot be written as {subtype} at {sample_rate} Hz ({_reason(error)}): "
            "take PCM_16, or a .wav file"
        ) from error
    write_bytes(path, content.getvalue(), sync=False)


def write_bytes(path: str | Path, content: bytes, *, sync: bool = True) -> None:
    """Write all bytes of a file through `atomic_file`.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    try:
        with atomic_file(path, sync=sync) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({_reason(error)}): free disk space or choose another folder"
        ) from error


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; at the end it takes the place of `path`.

    Whenever the process stops, `path` is the old file or the whole new one.

    Args:
        path: the file; its folder must exist.
        sync: wait for the disk, so that this also holds when the power fails.

    Raises:
        OSError: the system's; the temporary file is gone and `path` is as before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if sync:
            wait_for_disk(temporary)
        os.replace(temporary, path)
        if sync:
            wait_for_disk(path.parent)  # without it the rename can be lost with the power
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def resample(wave: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Change the sample rate with soxr's high-quality band-limited filter.

    Args:
        wave: [C, T] float32, full scale 1.
        from_rate: Hz, of `wave`.
        to_rate: Hz, of the result.

    Returns:
        [C, T'] float32 with T' = T * to_rate / from_rate, rounded up; `wave` itself if the rates
        are equal.

    Raises:
        DataError: a rate below 1 Hz.
    """
    if from_rate < 1 or to_rate < 1:
        raise DataError(f"cannot resample from {from_rate} Hz to {to_rate} Hz: rates start at 1 Hz")
    if from_rate == to_rate:
        return wave
    length = -(-wave.shape[-1] * to_rate // from_rate)
    samples = np.ascontiguousarray(wave.detach().cpu().float().numpy().T)  # [T, C]
    result = torch.from_numpy(soxr.resample(samples, from_rate, to_rate, quality="HQ").T)
    # soxr rounds the length to the nearest: make it the same whatever its version.
    return torch.nn.functional.pad(result, (0, length - result.shape[-1])).contiguous()


def check_rate(info: AudioInfo, expected: int) -> None:
    """Raise DataError for a file whose rate is not `expected`, Hz: nothing is resampled unasked."""
    if info.sample_rate != expected:
        raise DataError(
            f"{info.path} has a sample rate of {info.sample_rate} Hz but audio.sample_rate is "
            f"{expected}: resample the data with `diffbuf data build`, or set "
            f"audio.sample_rate={info.sample_rate}"
        )


def list_audio(folder: str | Path) -> list[Path]:
    """List the .wav and .flac files at any depth below a folder, sorted by path.

    Links to folders are followed (once each); names that begin with a dot are left out.

    Raises:
        DataError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist: check the path")
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        real = os.path.realpath(here)
        if real in seen:  # a link back up: do not walk in circles
            folders.clear()
            continue
        seen.add(real)
        audio = (name for name in names if name.lower().endswith(EXTENSIONS))
        found += [Path(here, name) for name in audio if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _open(path: Path) -> soundfile.SoundFile:
    """Open an audio file that holds samples and is as long as its header says."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(f"{path} is not a file: check the path")
        if size == 0:
            raise DataError(f"{path} is empty (0 bytes): fetch or make it again")
        _check_not_cut(path, size)
        file = soundfile.SoundFile(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path") from None
    except (soundfile.SoundFileError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as audio ({_reason(error)}): fetch or make it again"
        ) from error
    if file.frames < 1:
        file.close()
        raise DataError(f"{path} has no samples: remove it, or make it again")
    return file


def _check_not_cut(path: Path, size: int) -> None:
    """Compare a wav file's size with its header: libsndfile quietly reads what is there."""
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != b"RIFF":
        return
    (declared,) = struct.unpack("<I", head[4:])
    # The last chunk's padding byte may be counted but absent, hence one byte of grace.
    if 0 < declared < _RIFF_SIZE_UNKNOWN and declared + 8 > size + 1:
        raise DataError(
            f"{path} is cut short: {size} of {declared + 8} bytes are there: fetch or make it again"
        )


def _to_pcm(path: Path, samples: npt.NDArray[np.float64], subtype: str) -> npt.NDArray[np.integer]:
    """Round [T, C] float samples to integers; libsndfile itself would floor and clip them."""
    if subtype not in _PCM:
        raise DataError(f"{path}: subtype {subtype!r} is none of {', '.join([*_PCM, 'FLOAT'])}")
    peak = float(np.abs(samples).max())
    if peak > 1:
        raise DataError(
            f"{path}: the wave's peak {peak:.4g} is beyond full scale 1 and would be clipped: "
            "scale it down, or write it with subtype FLOAT"
        )
    dtype, bits, shift = _PCM[subtype]
    steps = np.round(samples * 2.0 ** (bits - 1))
    return np.minimum(steps, 2.0 ** (bits - 1) - 1).astype(dtype) << shift


def wait_for_disk(path: Path) -> None:
    """Wait until the disk holds a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """Return what went wrong on one line, without the path that libsndfile repeats."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()).rstrip(".")
