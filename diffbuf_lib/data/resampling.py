"""Copy a dataset folder at another sample rate."""

from __future__ import annotations

import shutil
from pathlib import Path

from tqdm import tqdm

from diffbuf_lib.data.audio import (
    atomic_file,
    list_audio,
    output_names,
    read_audio,
    read_info,
    resample,
    write_audio,
)
from diffbuf_lib.data.reader import READABLE
from diffbuf_lib.errors import DataError


def resample_folder(
    source: str | Path, out_path: str | Path, rate: int, *, progress: bool = False
) -> Path:
    """Copy a folder of any layout: the same tree, its audio as .wav of 32-bit floats.

    Files that are no audio are copied as they are. A stopped copy goes on when started again.

    Args:
        source: folder with audio at any depth.
        out_path: folder to make, outside of `source`.
        rate: Hz, of the copy.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no audio, one of the folders in the other, a damaged file, a full disk.
    """
    source, out_path = Path(source), Path(out_path)
    if rate < 1:
        raise DataError(f"--rate {rate}: rates start at 1 Hz")
    files = list_audio(source, READABLE)
    if not files:
        raise DataError(f"{source} holds no audio file: check the path")
    if out_path.resolve().is_relative_to(source.resolve()):
        raise DataError(f"the copy {out_path} lies inside {source}: choose another folder")
    known = set(files)
    others = [path for path in source.rglob("*") if path.is_file() and path not in known]
    try:
        for path in others:
            target = out_path / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target, sync=False) as temporary:
                shutil.copyfile(path, temporary)
        names = output_names(source, files, kept=(".wav",))
        with tqdm(files, disable=not progress) as bar:
            for path, name in zip(bar, names, strict=True):
                target = out_path / name
                if target.exists() and read_info(target).sample_rate == rate:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                wave, from_rate = read_audio(path)
                write_audio(target, resample(wave, from_rate, rate), rate, "FLOAT")
    except OSError as error:
        raise DataError(f"{out_path} cannot be written ({error}): free disk space") from error
    return out_path
