"""Headers of WAV files, where libsndfile does not handle them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from diffbuf_lib.errors import DataError

SUBTYPES = {
    (1, 8): "PCM_U8", (1, 16): "PCM_16", (1, 24): "PCM_24", (1, 32): "PCM_32",
    (3, 32): "FLOAT", (3, 64): "DOUBLE", (6, 8): "ALAW", (7, 8): "ULAW",
}  # fmt: skip
"""What libsndfile calls the codec of a format tag and a number of bits."""
SIZE_UNKNOWN = 0x7FFFF000  # from here on, a size is a placeholder by a program that wrote to a pipe
LARGEST_RIFF = 0xFFFFFFFF  # bytes that the header of a WAV can count


class WavHeader(NamedTuple):
    """The header of a WAV; `num_bytes` is None if its sizes do not tell it."""

    subtype: str
    sample_rate: int
    channels: int
    frame_bytes: int
    num_bytes: int | None


def read_wav_header(stream: BinaryIO) -> WavHeader:
    """Read a WAV from after its first 12 bytes (RIFF, size, WAVE) up to its first sample.

    DataError for a codec that is not in `SUBTYPES`, or a WAV that ends before its samples.
    """
    found, long_size = (0, 0, 0, 0, 0), 0
    while len(head := stream.read(8)) == 8:
        name, size = struct.unpack("<4sI", head)
        if name == b"data":
            break
        body = stream.read(min(size + size % 2, 1 << 24))
        if name == b"fmt " and len(body) >= 16:
            found = struct.unpack_from("<HHI4xHH", body)
            if found[0] == 0xFFFE and len(body) >= 26:  # extensible: the tag begins the GUID
                found = (struct.unpack_from("<H", body, 24)[0], *found[1:])
        if name == b"ds64" and len(body) >= 16:
            (long_size,) = struct.unpack_from("<Q", body, 8)  # of RF64
    else:
        raise DataError("the WAV ends before its samples: fetch or make it again")
    tag, channels, rate, frame_bytes, bits = found
    subtype = SUBTYPES.get((tag, bits))
    if subtype is None or channels < 1 or frame_bytes != channels * bits // 8:
        raise DataError(f"a WAV of codec {tag:#06x} with {bits} bits is not PCM: send 16-bit PCM")
    known = long_size or (size if size < SIZE_UNKNOWN else 0)
    return WavHeader(subtype, rate, channels, frame_bytes, known or None)


def has_more_than_it_says(path: Path) -> bool:
    """Return whether samples, and not just another chunk, follow an empty data chunk."""
    with path.open("rb") as file:
        file.seek(12)
        try:
            header = read_wav_header(file)
        except DataError:
            return False
        rest = file.read(8)
        left = path.stat().st_size - file.tell()
    if header.num_bytes is not None or len(rest) < 8:
        return header.num_bytes is None and bool(rest)
    name, size = struct.unpack("<4sI", rest)
    return size > left or not all(32 <= byte < 127 for byte in name)


def make_plain_wav(path: Path, channels: int) -> None:
    """Turn an RF64 file into a WAV that every program reads, if its sizes allow that."""
    with path.open("r+b") as file:
        head = bytearray(file.read(512))
        if len(head) < 80 or head[:4] != b"RF64":
            return
        riff_size, data_size = struct.unpack_from("<QQ", head, 20)
        if riff_size > LARGEST_RIFF:
            return
        struct.pack_into("<4sI4s4s", head, 0, b"RIFF", riff_size, b"WAVE", b"JUNK")
        fmt = head.index(b"fmt ")
        if channels <= 2:  # the long form only adds which loudspeaker is whose
            struct.pack_into("<IH", head, fmt + 4, 16, 3)
            struct.pack_into("<4sI", head, fmt + 24, b"JUNK", 16)
        struct.pack_into("<I", head, head.index(b"data", fmt) + 4, data_size)
        file.seek(0)
        file.write(head)
