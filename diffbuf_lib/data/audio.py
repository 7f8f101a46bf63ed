"""Read, write and resample one audio file; every error names the file and what to do about it."""

from __future__ import annotations

import io
import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor

from diffbuf_lib.data.reader import AudioReader, reason
from diffbuf_lib.data.riff import make_plain_wav
from diffbuf_lib.errors import DataError

EXTENSIONS = (".wav", ".flac")
# Integer sample type, bits that count, and left shift of each PCM subtype that is written.
_PCM: dict[str, tuple[type[np.signedinteger], int, int]] = {
    "PCM_16": (np.int16, 16, 0),
    "PCM_24": (np.int32, 24, 8),
}
_ENDLESS = 1 << 62  # samples: more than any file has


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says: `sample_rate` in Hz, `frames` per channel."""

    path: Path
    sample_rate: int
    channels: int
    frames: int


def read_info(path: str | Path, *, decode: bool = False) -> AudioInfo:
    """Read the header of an audio file; its samples only where it does not tell their number.

    Args:
        path: the file.
        decode: count the samples that can be decoded, and warn where the header promises others.

    Raises:
        DataError: the file is missing, empty, no audio, or (without `decode`) shorter than its
            header says.
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


def read_audio(path: str | Path, start: int = 0, frames: int | None = None) -> tuple[Tensor, int]:
    """Read samples of an audio file; of .wav and .flac only the requested part is decoded.

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
    with AudioReader(path) as file:
        known = file.frames
        wanted = frames if frames is not None else 1 if known is None else known - start
        if start < 0 or wanted < 1 or (known is not None and start + wanted > known):
            raise DataError(
                f"{path} has {known or 'fewer'} samples, so samples {start} to {start + wanted} "
                "cannot be read: make the file again, or ask for a part that it has"
            )
        file.seek(start)
        to_the_end = frames is None and known is None
        samples = file.read(_ENDLESS if to_the_end else wanted)  # [T, C]
        if len(samples) < wanted or (frames is None and file.is_cut):
            promised = wanted if frames is not None else (file.promised or wanted) - start
            raise DataError(
                f"{path} is cut short: {len(samples)} of {promised} samples from sample {start} "
                "could be decoded: fetch or make it again"
            )
        rate = file.sample_rate
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
            f"{path} cannot be written as {subtype} at {sample_rate} Hz ({reason(error)}): "
            "take PCM_16, or a .wav file"
        ) from error
    write_bytes(path, content.getvalue(), sync=False)


@contextmanager
def audio_output(
    path: Path, sample_rate: int, channels: int, *, atomic: bool = True
) -> Iterator[soundfile.SoundFile]:
    """Open a .wav of 32-bit floats, so that nothing is clipped, or a .flac of 24 bit to write to.

    A .wav that outgrows the sizes of its format becomes RF64.

    Args:
        path: the file; its folder is made.
        sample_rate: Hz.
        channels: how many.
        atomic: as with `atomic_file`; else the file is there and grows.

    Raises:
        DataError: another file name, or it cannot be written.
    """
    kind, subtype = output_format(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, sync=False) if atomic else nullcontext(path) as target:
            target.open("wb").close()  # of the umask's mode
            try:
                with soundfile.SoundFile(
                    os.fsencode(target), "w", sample_rate, channels, subtype, format=kind
                ) as file:
                    yield file
            finally:
                if kind == "RF64":
                    make_plain_wav(target, channels)
    except (OSError, soundfile.SoundFileError) as error:
        raise DataError(
            f"{path} cannot be written ({reason(error)}): free disk space or choose another folder"
        ) from error


def output_format(path: Path) -> tuple[str, str]:
    """Return format and subtype, as soundfile calls them, of an output.

    Raises:
        DataError: a name in neither .wav nor .flac.
    """
    formats = {".wav": ("RF64", "FLOAT"), ".flac": ("FLAC", "PCM_24")}
    if path.suffix.lower() not in formats:
        raise DataError(f"{path}: give the output a name in .wav or .flac (stream: - for stdout)")
    return formats[path.suffix.lower()]


def refuse_same_file(source: Path, output: Path) -> None:
    """Raise DataError for an output that is the input itself, also through links."""
    if output.exists() and source.exists() and output.samefile(source):
        raise DataError(f"the output {output} is the input {source}: give it another name")


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
            f"{path} cannot be written ({reason(error)}): free disk space or choose another folder"
        ) from error


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; at the end it takes the place of `path`.

    Whenever the process stops, `path` is the old file or the whole new one. A link stays one: the
    file that it leads to is written.

    Args:
        path: the file; its folder must exist.
        sync: wait for the disk, so that this also holds when the power fails.

    Raises:
        OSError: the system's; the temporary file is gone and `path` is as before.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
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
            f"{expected}: copy the data with `diffbuf data resample IN OUT "
            f"--rate {expected}`, or set "
            f"audio.sample_rate={info.sample_rate}"
        )


def list_audio(folder: str | Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """List the .wav and .flac files (or others) at any depth below a folder, sorted by path.

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
        audio = (name for name in names if name.lower().endswith(extensions))
        found += [Path(here, name) for name in audio if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def text_of(path: Path) -> str:
    """Return a path as text for any file or page: bytes that are no UTF-8 as hexadecimals."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def output_names(
    root: Path, files: Sequence[Path], kept: tuple[str, ...] = EXTENSIONS
) -> list[Path]:
    """Return names below `root`, .wav instead of all but `kept` extensions; no two are equal."""
    names = [path.relative_to(root) for path in files]
    given = {name for name in names if name.suffix.lower() in kept}
    outputs = []
    for name in names:
        output = name
        if name.suffix.lower() not in kept:
            short = name.with_suffix(".wav")
            output = short if short not in given else name.with_name(f"{name.name}.wav")
            given.add(output)
        outputs.append(output)
    return outputs


@lru_cache(maxsize=1 << 16)
def _decoded(path: Path, size: int, changed: int) -> tuple[int, bool, list[str]]:
    """Decode a file of that size and time: return its samples, whether it is cut, complaints."""
    with AudioReader(path, repair=True) as file:
        for _ in file.blocks(1 << 16):
            pass
        file.repaired = 0
        return file.position, file.is_cut, file.complaints()


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
