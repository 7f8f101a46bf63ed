"""Write clips as shards, for `diffbuf_lib.data.shards` to read."""

from __future__ import annotations

import hashlib
import io
import math
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data import audio, build
from diffbuf_lib.data.datasets import ClipDataset, find_layout
from diffbuf_lib.data.shards import INDEX, row_type, shard_path
from diffbuf_lib.errors import DataError
from diffbuf_lib.registry import LAYOUTS

# What `make` returns for a clip: its name, and the files of mix and target.
Source = tuple[str, Path, Path]


def pack_folder(source: str | Path, out_path: str | Path, **how: Any) -> Path:
    """Write a folder of pairs, or each of its splits train, valid and test, as shards.

    16-bit samples are kept as they are, others are rounded to 24 bits. Part i of n writes every
    n-th shard, and the last part to finish writes the index; interrupted packing resumes when
    started again. `how` has the options of `write_shards`. DataError: no folder of pairs, a pair
    that does not match, a folder packed with other options, a full disk.
    """
    source, out_path = Path(source), Path(out_path)
    splits = [source / name for name in ("train", "valid", "test") if find_layout(source / name)]
    for folder in [source] if find_layout(source) else splits or [source]:
        layout = find_layout(folder)
        dataset: ClipDataset | None = LAYOUTS[layout].load()(folder) if layout else None
        if dataset is None or len(dataset.items[0]) != 2:
            raise DataError(
                f"{folder} holds no pairs of mix and target files to pack: check the path, or make "
                "them from speech/ and noise/ with `diffbuf data build`"
            )
        dataset.sample_rate = audio.read_info(dataset.items[0][0]).sample_rate
        out = out_path if folder == source else out_path / folder.name
        names = [dataset.label(i) for i in range(len(dataset))]
        write_shards(out, names, partial(_checked, dataset), **how)
        if (folder / "metadata.json").is_file():
            shutil.copyfile(folder / "metadata.json", out / "metadata.json")
    return out_path


def build_shards(
    speech_dir: str | Path, noise_dir: str | Path, out_path: str | Path, **options: Any
) -> Path:
    """Write what `build_dnlm` makes as shards, equal to those of `pack_folder` afterwards.

    Meanwhile the disk holds the samples of at most one shard per process. Options and errors are
    those of both.
    """
    given = ("clips", "part", "processes", "progress")
    how = {name: options.pop(name) for name in given if name in options}
    samples = build.prepare(speech_dir, noise_dir, out_path, **options)
    for split, found in groupby(samples, key=lambda sample: sample.split):
        made = list(found)
        names = [sample.folder.name for sample in made]
        write_shards(split.folder, names, partial(_made, made), remove=True, **how)
        build.write_records(split.folder, made)
    return Path(out_path)


def write_shards(
    out: Path,
    names: Sequence[str],
    make: Callable[[int], Source],
    *,
    clips: int = 1000,  # per shard: about 40 MB for clips of 1 s
    part: str = "1/1",  # of a job array
    processes: int | None = None,  # how many work side by side; None: this machine's cores
    progress: bool = False,  # show a progress bar on stderr
    remove: bool = False,
) -> None:
    """Write the clips `make(0)`, `make(1)`, ...; with `remove`, delete their folders too."""
    if clips < 1:
        raise DataError(f"--clips {clips}: a shard holds at least 1")
    count = len(names)
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()
    made_of = {"format": 1, "clips": count, "a_shard": clips, "names": digest}
    build.claim(out / "pack.json", made_of)
    shards = math.ceil(count / clips)
    rows = [shard_path(out, k).with_suffix(".npy") for k in range(shards)]
    todo = [k for k in build.take_part(range(shards), part) if not rows[k].exists()]
    dtype = row_type(max(len(name.encode()) for name in names))
    write = partial(_write_shard, out, count, make, clips, dtype, remove)
    build.run_parallel(write, todo, processes or build.cores(), desc="shards", disable=not progress)
    if all(path.exists() for path in rows):
        _save(out / INDEX, np.concatenate([np.load(path) for path in rows]))


def _checked(dataset: ClipDataset, i: int) -> Source:
    mix, target = dataset.items[i]
    dataset.check_pair(audio.read_info(mix), audio.read_info(target))
    return dataset.label(i), mix, target


def _made(samples: Sequence[build.Sample], i: int) -> Source:
    build.make_sample(samples[i])
    folder = samples[i].folder
    return folder.name, folder / "mixture.wav", folder / "vocals.wav"


def _write_shard(
    out: Path,
    count: int,
    make: Callable[[int], Source],
    clips: int,
    dtype: np.dtype[Any],
    remove: bool,
    number: int,
) -> None:
    rows, path = [], shard_path(out, number)
    sources = [make(i) for i in range(number * clips, min((number + 1) * clips, count))]
    with (
        audio.writing(path),
        audio.atomic_file(path, sync=False) as temporary,
        # Without times and owners, so that the same clips give the same bytes.
        tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name, *files in sources:
            waves, rates = zip(*(audio.read_audio(file) for file in files), strict=True)
            frames = min(wave.shape[-1] for wave in waves)
            starts, sizes, crc = [], [], 0
            for stem, file, wave in zip(("mix", "target"), files, waves, strict=True):
                flac = _to_flac(file, wave[:, :frames], rates[0])
                entry = tarfile.TarInfo(f"{name}.{stem}.flac")
                entry.size = len(flac)
                tar.addfile(entry, io.BytesIO(flac))
                starts.append(tar.offset - -(-len(flac) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
                sizes.append(len(flac))
                crc = zlib.crc32(flac, crc)
            place = (number, starts[0], sizes[0], starts[1] - starts[0], sizes[1])
            rows.append((*place, frames, rates[0], crc, name.encode()))
    _save(path.with_suffix(".npy"), np.array(rows, dtype))
    for _, mix, _ in sources if remove else ():
        shutil.rmtree(mix.parent, ignore_errors=True)


def _to_flac(path: Path, wave: Tensor, rate: int) -> bytes:
    steps = wave.double() * 32768
    exact = torch.equal(steps, steps.round()) and float(steps.max()) < 32768
    flac = path.with_suffix(".flac")
    return audio.encode_audio(flac, wave, rate, "PCM_16" if exact else "PCM_24")


def _save(path: Path, rows: Any) -> None:
    content = io.BytesIO()
    np.save(content, rows, allow_pickle=False)
    audio.write_bytes(path, content.getvalue())
