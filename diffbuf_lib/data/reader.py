"""One reader for every audio file: it counts the actual samples and does not trust the header."""

from __future__ import annotations

import io
import math
import os
import re
import shlex
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from diffbuf_lib.data.riff import SIZE_UNKNOWN, SUBTYPES, has_more_than_it_says
from diffbuf_lib.errors import DataError

Block = np.ndarray[Any, np.dtype[np.float32]]

# fmt: off
READABLE = (  # extensions of files that libsndfile reads
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".mp3", ".mp2", ".ogg", ".oga", ".opus",
    ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".voc", ".sph", ".nist",
)
CONVERTIBLE = (  # and of those that it cannot read but ffmpeg can
    ".m4a", ".m4b", ".aac", ".mp4", ".wma", ".webm", ".mka", ".mkv", ".mov", ".avi", ".amr", ".ape",
    ".wv", ".ac3", ".3gp", ".tta", ".dsf",
)
# fmt: on

# What libsndfile logs of a header that promises more (or other) bytes than the file has.
_WRONG_SIZE = re.compile(r"^\s*([\w ]+?)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_DATA_SIZES = ("data", "SSND", "Data Size", "BODY", "Riff size", "riff")  # those of the samples
_FORGIVEN_BYTES = 16  # by which writers miscount a size without losing a sample
_UNREAD = 0x7FC0D1FF  # a NaN that no decoder writes
_SEEKS_EXACTLY = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC")
_TAG_BYTES = 128  # of ID3, at an MP3's end
_DECODED_AT_A_TIME = 4096  # samples
_GUESSED = 2**62  # samples: a count from here on means that libsndfile does not know it
_AGAIN = "fetch or make it again"
_RATES = (1000, 1_000_000)  # Hz; a rate outside these means a damaged header


class AudioReader:
    """An audio file, decoded from front to back; use it in a `with` statement.

    NaN and Inf are refused or, with `repair`, replaced by zeros. DataError if the file is missing,
    empty or not audio.
    """

    def __init__(self, path: str | Path, *, repair: bool = False) -> None:
        self.path, self.repair = Path(path), repair
        # Samples that the header promises; None if it says nothing that can be trusted.
        self._file, self.promised = _open(self.path)
        self.sample_rate, self.channels = self._file.samplerate, self._file.channels
        self.position = self.repaired = 0  # samples read, and values replaced by zeros
        self.peak = 0.0  # the largest magnitude that `blocks` read
        self._problem = ""
        self._decoded: Block = np.zeros((0, self.channels), np.float32)  # and not yet returned
        self._power = np.zeros(2)  # of the mono mix; the same if the channels were uncorrelated
        self._sizes: dict[str, tuple[int, int]] = {
            name: (int(said), int(there))
            for name, said, there in _WRONG_SIZE.findall(self._file.extra_info)
            if int(said) < SIZE_UNKNOWN
        }
        said, there = next((self._sizes[x] for x in _DATA_SIZES if x in self._sizes), (0, 0))
        self.missing_bytes = max(said - there, 0)
        if self.promised is not None and there and self.missing_bytes:
            self.promised = round(self.promised * said / there)

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def frames(self) -> int | None:
        """Number of samples by the header and the file's size; None if these do not tell it."""
        return None if self.promised is None else int(self._file.frames)

    @property
    def is_counted(self) -> bool:
        """Whether `frames` follows from the file's size, because nothing is compressed."""
        return self._file.subtype in SUBTYPES.values() and self._file.format != "FLAC"

    def blocks(self, size: int, *, mono: bool = False) -> Iterator[Block]:
        """Yield blocks of `size` samples, the last one shorter, from here to the file's end.

        [T, C] float32, full scale 1; if mono [T, 1], the channels' average. DataError if no sample
        can be decoded, or the file holds NaN or Inf.
        """
        while len(block := self.read(size)):
            self.peak = max(self.peak, float(np.abs(block).max()))
            yield self._mix(block) if mono else block
        if self.position == 0:
            why = self._problem or "nothing in it can be decoded"
            raise DataError(f"{self.path} has no samples ({why}): {_AGAIN}")

    def read(self, frames: int) -> Block:
        """Read up to `frames` samples, [T, C] float32; fewer only where no more can be decoded."""
        parts = [self._decoded[:0]]
        while frames > 0:
            if not len(self._decoded):
                self._decoded = self._decode()
            part, self._decoded = self._decoded[:frames], self._decoded[frames:]
            if not len(part):
                break
            parts.append(part)
            frames -= len(part)
            self.position += len(part)
        return self._checked(np.concatenate(parts))

    def skip_to(self, start: int) -> None:
        """Go forward to sample `start`: by seeking if that is exact, else by decoding up to it."""
        if start > self.position and self._file.format in _SEEKS_EXACTLY:
            try:
                self._file.seek(start)
                self.position, self._decoded = start, self._decoded[:0]
            except soundfile.SoundFileError:  # the codec cannot seek, or the file is cut before
                self._file.close()
                self._file, _ = _open(self.path)
                self.position, self._problem, self._decoded = 0, "", self._decoded[:0]
        repair, self.repair = self.repair, True  # what is passed over may hold anything
        while (left := start - self.position) > 0 and len(self.read(min(left, _DECODED_AT_A_TIME))):
            pass
        self.repair = repair

    @property
    def is_cut(self) -> bool:
        """Whether samples are known to be missing so far; sizes may be off by a few bytes."""
        return self.missing_bytes > _FORGIVEN_BYTES or bool(self._problem)

    def complaints(self) -> list[str]:
        """Return what was wrong with the file, a line each; call it after the last block."""
        said, promised, read = [], self.promised, self.position
        if promised is not None and promised > read:
            said.append(f"only {read} of {promised} samples are there")
        elif self._problem:
            said.append(f"{read} samples were read, then: {self._problem}")
        elif self._sizes:
            said.append(f"sizes in its header are wrong; {read} samples read")
        if self.repaired:
            said.append(f"{self.repaired} NaN or Inf values count as zeros")
        mix, apart = self._power
        if mix < 0.25 * apart:
            loss = f"{10 * math.log10(apart / mix):.0f} dB" if mix else "all of it"
            said.append(f"its channels cancel: the mono mix loses {loss}: give --channels keep")
        return [f"{self.path}: {line}" for line in said]

    def warn(self) -> None:
        """Warn of every complaint."""
        for line in self.complaints():
            warnings.warn(line, stacklevel=2)

    def _decode(self) -> Block:
        """Decode a fixed number of samples, so that errors do not depend on the sizes asked for.

        What libsndfile leaves unwritten after an error is not taken for audio.
        """
        block = np.empty((_DECODED_AT_A_TIME, self.channels), np.float32)
        block.view(np.uint32)[:] = _UNREAD
        if self._problem:
            return block[:0]
        try:
            count = self._file.buffer_read_into(block, "float32")
        except (soundfile.SoundFileError, OSError) as error:
            self._problem = reason(error)
            unread = np.flatnonzero((block.view(np.uint32) == _UNREAD).all(axis=1))
            count = int(unread[0]) if len(unread) else len(block)
        return block[:count]

    def _checked(self, block: Block) -> Block:
        """Refuse NaN and Inf, or replace them by zeros."""
        bad = ~np.isfinite(block)
        if number := int(np.count_nonzero(bad)):
            if not self.repair:
                fix = "make it again, or replace them by zeros with diffbuf enhance --repair"
                raise DataError(f"{self.path} holds {number} NaN or Inf samples: {fix}")
            self.repaired += number
            block[bad] = 0
        return block

    def _mix(self, block: Block) -> Block:
        """Average the channels, and record how much of their power that leaves."""
        mono: Block = block.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        # Uncorrelated channels would keep this power; the factor 2 compares a stereo file's mono
        # mix with the mean of its channels.
        apart = 2 * np.square(block, dtype=np.float64).sum() / self.channels**2
        self._power += (np.square(mono, dtype=np.float64).sum(), apart)
        return mono


def reason(error: Exception) -> str:
    """Return what went wrong on one line, without the path that libsndfile repeats."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()).rstrip(".")


class _SoundFile(soundfile.SoundFile):
    """A file that is only read forwards.

    After a read, soundfile seeks a seekable file to where it already is. An MP3 then loses what
    its next frame needs from the last, and the seek fails at the end of a FLAC of unknown length.
    """

    def seekable(self) -> bool:
        return False


class _Disguise(io.FileIO):
    """A file as libsndfile should see it: with another RIFF size, or larger than it is."""

    def __init__(self, path: Path, *, riff_size: int | None = None, factor: int = 1) -> None:
        super().__init__(path)
        self._patch = b"" if riff_size is None else struct.pack("<I", riff_size)
        self._size = factor * super().seek(0, os.SEEK_END)
        self._at = 0

    def __del__(self) -> None:
        self.close()  # libsndfile leaves that to the caller

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max((0, self._at, self._size)[whence] + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        super().seek(self._at)
        count = super().readinto(buffer) or 0
        if count == 0 and self._size - self._at <= _TAG_BYTES:  # the false end has no tag
            count = len(buffer)
            buffer[0:count] = bytes(count)
        for i, value in enumerate(self._patch, 4 - self._at):
            if 0 <= i < count:
                buffer[i : i + 1] = bytes([value])
        self._at += count
        return count


def _open(path: Path) -> tuple[_SoundFile, int | None]:
    """Open a file; also return how many samples libsndfile counts, None where it guesses."""
    unread, convert = f"{path} cannot be read as audio", f"convert it with {ffmpeg_line(path)}"
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(f"{path} is not a file: check the path")
        if size == 0:
            raise DataError(f"{path} is empty (0 bytes): {_AGAIN}")
        with path.open("rb") as raw:
            head = raw.read(12)
        if _is_foreign(path, head):
            raise DataError(f"{unread} (AAC, MP4, WebM or WMA): {convert}")
        file = _SoundFile(os.fsencode(path))
        count = file.frames
        if file.format == "MP3" and not _has_frame_count(path):
            # libsndfile guesses its length from the file's size and the first frame, and decodes no
            # further: if the file seems larger, it decodes all of it.
            file.close()
            file, count = _SoundFile(_Disguise(path, factor=64)), _GUESSED
        elif count == 0 and head[:4] == b"RIFF" and has_more_than_it_says(path):
            file.close()
            file = _SoundFile(_Disguise(path, riff_size=8))  # marks an unclosed file for libsndfile
            count = file.frames
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path") from None
    except DataError:
        raise
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        fix = convert if path.suffix.lower() in CONVERTIBLE else _AGAIN
        raise DataError(f"{unread} ({reason(error)}): {fix}") from error
    if count > 0 and _RATES[0] <= file.samplerate <= _RATES[1]:
        return file, count if count < _GUESSED else None
    file.close()
    problem = f"a sample rate of {file.samplerate} Hz, outside {_RATES[0]} to {_RATES[1]}"
    raise DataError(f"{path} has {problem if count > 0 else 'no samples'}: {_AGAIN}")


def _is_foreign(path: Path, head: bytes) -> bool:
    """Recognise AAC, which looks like MP3, and containers by their first bytes."""
    adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    box = head[4:8] == b"ftyp" or head[:4] in (b"\x1a\x45\xdf\xa3", b"\x30\x26\xb2\x75")
    return box or (adts and path.suffix.lower() in CONVERTIBLE)


def ffmpeg_line(path: Path) -> str:
    """Return the command that converts a file to .wav."""
    foreign = path.suffix.lower() in CONVERTIBLE
    wav = path.with_suffix(".wav") if foreign else path.with_name(f"{path.name}.wav")
    return f"ffmpeg -i {shlex.quote(str(path))} {shlex.quote(str(wav))}"


def _has_frame_count(path: Path) -> bool:
    """Return whether an MP3 begins with a Xing or Info frame, which says how many follow."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:
            a, b, c, d = (byte & 0x7F for byte in head[6:])
            file.seek(10 + (a << 21 | b << 14 | c << 7 | d))
            head = b""
        head = (head + file.read(2048))[:2048]
    return b"Xing" in head or b"Info" in head
