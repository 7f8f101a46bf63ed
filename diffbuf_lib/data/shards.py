"""Clips in shards: tar files of FLAC pairs and an index, in a folder or wherever fsspec reads.

shard-00000.tar   NAME.mix.flac and NAME.target.flac of many clips, in the folder's order
shard-00000.npy   where they stand in it: rows of `row_type`
index.npy         all of these together; written last, so a folder without it is not finished
metadata.json     the folder's own, if it has one

Any tar program reads the .tar files. A clip is one range of bytes, and its CRC-32 is in the index:
what is damaged, cut short or half read is never trained on.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import soundfile
import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data.datasets import ClipDataset, draw_crop, place_crop
from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import DataError, DiffbufError, MissingExtraError
from diffbuf_lib.registry import LAYOUTS

INDEX = "index.npy"
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # s before each retry of what the network may have spoilt


def row_type(longest: int) -> np.dtype[Any]:
    """Return the type of a clip's row in the index; names are UTF-8, at most `longest` bytes."""
    return np.dtype([
        ("shard", "<u4"), ("offset", "<u8"),  # where the mix's FLAC begins
        ("mix", "<u4"), ("start", "<u4"), ("target", "<u4"),  # bytes; start: of target, from offset
        ("frames", "<u4"), ("rate", "<u4"),  # samples; Hz
        ("crc", "<u4"), ("name", f"S{longest}"),  # of both FLACs, one after the other
    ])  # fmt: skip


def shard_path(folder: Path, number: int) -> Path:
    """Return where a shard lies."""
    return folder / f"shard-{number:05d}.tar"


@LAYOUTS.register("shards")
class ShardDataset(ClipDataset):
    """Shards of `diffbuf data pack`, in a folder or at a URL: the clips of the packed folder.

    What is read from a URL is cached in a file on this machine, up to a limit: always the first
    clips of the index. An epoch's order is random, so no other choice is better, and no process has
    to know what the others keep.
    """

    holds = "index.npy and shard-*.tar of `diffbuf data pack`"
    parts = (INDEX,)

    def __init__(
        self,
        root: str | Path,
        chunk_size: int = 16000,
        *,
        cache_path: str | None = None,  # folder of the cache (data.cache_path)
        cache_gb: float = 10.0,  # its limit (data.cache_gb)
        **shared: Any,  # the other arguments of `ClipDataset`
    ) -> None:
        self.url = str(root).rstrip("/")
        self.is_remote = "://" in self.url
        self._cache: Path | None = None
        self._cached = 0  # clips at the front of the index that the cache keeps
        self._limit = cache_gb * 1e9
        self._folder = Path(cache_path or Path.home() / ".cache" / "diffbuf").expanduser()
        self._ahead: dict[int, bytes] = {}
        super().__init__(root, chunk_size, **shared)

    @staticmethod
    def options(cfg: Config) -> dict[str, Any]:
        """Return the arguments that the config's section `data` sets."""
        return {"cache_path": cfg.data.cache_path, "cache_gb": cfg.data.cache_gb}

    def _open(self) -> Sequence[tuple[Path, ...]]:
        where = f"{self.url}/{INDEX}"
        content = _download(where) if self.is_remote else b""
        try:
            if self.is_remote:
                self.index = np.load(io.BytesIO(content), allow_pickle=False)
            else:
                self.index = np.load(where, mmap_mode="r", allow_pickle=False)
            if self.index.dtype.names != row_type(1).names or not len(self.index):
                raise ValueError("it is not an index of shards")
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{where} cannot be read ({reason(error)}): pack it again") from error
        if other := set(np.unique(self.index["rate"]).tolist()) - {self.sample_rate}:
            raise DataError(
                f"{where} holds clips of {other.pop()} Hz but audio.sample_rate is "
                f"{self.sample_rate}: run `diffbuf data resample` and pack again, or set that key"
            )
        self._sizes = self.index["start"].astype(np.int64) + self.index["target"]  # bytes
        self._places = np.cumsum(self._sizes) - self._sizes  # in the cache
        if self.is_remote and self._limit > 0:
            self._cached = int(np.searchsorted(self._places + self._sizes, self._limit, "right"))
            digest = hashlib.sha256(f"{self.url} {zlib.crc32(content)}".encode()).hexdigest()
            self._cache = self._folder / f"{digest[:16]}.clips"
        return [()] * len(self.index)  # clips are not files

    def name(self, i: int) -> str:
        """Return the shard's and the clip's name."""
        return f"{self.url}/{shard_path(Path(), self.index['shard'][i])}:{self.label(i)}"

    def label(self, i: int) -> str:
        """Return what the clip was called in its folder."""
        return bytes(self.index["name"][i]).decode()

    def length(self, i: int) -> int:
        """Return the samples of a clip."""
        return int(self.index["frames"][i])

    def read(self, i: int, frames: int) -> list[Tensor]:
        """Read a clip's first samples: mix and target, [C, T]."""
        return self._decode(i, 0, frames)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Fetch the clips that will be asked for next, all at once."""
        self._ahead = dict(zip(indices, self.fetch(indices), strict=True))

    def fetch(self, indices: Sequence[int]) -> list[bytes]:
        """Return the bytes of clips, from the cache or from where they lie.

        DataError for an object that is gone or forbidden, or after some retries short or damaged.
        """
        found = {i: data for i in indices if (data := self._from_cache(i))}
        for wait in (*(_WAITS if self.is_remote else ()), None):
            missing = [i for i in dict.fromkeys(indices) if i not in found]
            if not missing:
                break
            problems = self._from_store(missing, found)
            lasting = [i for i in problems if wait is None or _lasts(problems[i])]
            if lasting:
                error = problems[lasting[0]]
                raise _explained(self.name(lasting[0]), error) from error
            if problems:
                time.sleep(wait or 0)
        return [found[i] for i in indices]

    def _from_store(self, indices: Sequence[int], found: dict[int, bytes]) -> dict[int, Exception]:
        """Put clips into `found` and the cache; return what went wrong with the others."""
        rows = self.index[np.asarray(indices)]
        paths = [f"{self.url}/{shard_path(Path(), number)}" for number in rows["shard"]]
        starts = rows["offset"].astype(int).tolist()
        ends = (rows["offset"].astype(np.int64) + self._sizes[np.asarray(indices)]).tolist()
        try:
            system, _ = fsspec.core.url_to_fs(self.url)
            paths = [system._strip_protocol(path) for path in paths]
            answers = system.cat_ranges(paths, starts, ends, on_error="return")
        except Exception as error:  # whatever the store or the network raises
            answers = [error] * len(paths)
        problems = {}
        for i, answer in zip(indices, answers, strict=True):
            if isinstance(answer, BaseException):
                problems[i] = answer if isinstance(answer, Exception) else OSError(str(answer))
            elif len(answer) < self._sizes[i]:
                text = f"only {len(answer)} of the clip's {self._sizes[i]} bytes are there"
                problems[i] = EOFError(text)
            elif not self._is_whole(i, answer):
                problems[i] = EOFError("its bytes are not those that were packed")
            else:
                found[i] = answer
                self._to_cache(i, answer)
        return problems

    def _is_whole(self, i: int, data: bytes) -> bool:
        row = self.index[i]
        crc = zlib.crc32(data[row["start"] :], zlib.crc32(data[: row["mix"]]))
        return len(data) == self._sizes[i] and crc == int(row["crc"])

    def _from_cache(self, i: int) -> bytes | None:
        """Return a clip from the cache; one that was never or half written fails its CRC."""
        if self._cache is None or i >= self._cached or not self._cache.exists():
            return None
        with open(self._cache, "rb") as file:
            data = os.pread(file.fileno(), int(self._sizes[i]), int(self._places[i]))
        return data if self._is_whole(i, data) else None

    def _to_cache(self, i: int, data: bytes) -> None:
        if self._cache is None or i >= self._cached:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._cache, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, data, int(self._places[i]))
            finally:
                os.close(descriptor)
        except OSError as error:
            warnings.warn(f"no cache in {self._folder} ({reason(error)})", stacklevel=2)
            self._cache = None

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        random = rng if self.training else None
        crop = draw_crop(self.length(index), self.chunk_size, self.leading_zeros, random)
        waves = self._decode(index, crop.start, max(crop.frames, 1))
        mix, target = (place_crop(wave, crop, self.chunk_size) for wave in waves)
        return mix, target

    def _decode(self, i: int, start: int, frames: int) -> list[Tensor]:
        data, row = self._ahead.pop(i, None) or self.fetch([i])[0], self.index[i]
        waves = []
        for flac in (data[: row["mix"]], data[row["start"] :]):
            with soundfile.SoundFile(io.BytesIO(flac)) as file:
                file.seek(start)
                wave = file.read(frames, "float32", always_2d=True)  # [T, C]
            waves.append(torch.from_numpy(np.ascontiguousarray(wave.T)))
        return waves


def _download(where: str) -> bytes:
    for wait in (*_WAITS, None):
        try:
            system, path = fsspec.core.url_to_fs(where)
            return bytes(system.cat_file(path))
        except Exception as error:  # whatever the store or the network raises
            if wait is None or _lasts(error):
                raise _explained(where, error) from error
        time.sleep(wait)
    raise AssertionError


def _lasts(error: Exception) -> bool:
    """Return whether an error will last, however long one waits."""
    lasting = (FileNotFoundError, PermissionError, ImportError, ValueError)
    return isinstance(error, lasting) or "Credentials" in type(error).__name__


def _explained(name: str, error: Exception) -> DiffbufError:
    why = reason(error)
    if isinstance(error, ImportError):
        return MissingExtraError(f"{name}: {why}; for s3:// pip install 'diffbuf[remote]'")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name} is not there: check the path, or pack or copy it again")
    if isinstance(error, EOFError):
        return DataError(f"{name} is damaged or short: {why}: pack or copy the shard again")
    if _lasts(error):
        return DataError(f"{name} is refused ({why}): check path and credentials (environment)")
    return DataError(f"{name} cannot be read ({type(error).__name__}: {why}), even after retries")
