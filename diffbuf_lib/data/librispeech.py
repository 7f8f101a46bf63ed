"""Fetch LibriSpeech (Panayotov et al., ICASSP 2015; CC BY 4.0) through torchaudio."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from diffbuf_lib.errors import DataError

SUBSETS = (
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
)


def download_librispeech(out_dir: str | Path, subset: str = "train-clean-100") -> Path:
    """Download and unpack one subset; a subset that is already there is left alone.

    The archive is checked against its hash and unpacked beside its final place, so a folder called
    as the subset is a whole one. An interrupted download starts again.

    Args:
        out_dir: the subset will be `out_dir/LibriSpeech/<subset>`.
        subset: one of `SUBSETS`; "dev-clean" has 5.4 hours (0.3 GB), "train-clean-100" 100 (6 GB).

    Returns:
        The subset's folder: one folder a speaker, .flac at 16 kHz; give it to `build_dnlm`.

    Raises:
        DataError: an unknown subset, no network, or a full disk.
    """
    if subset not in SUBSETS:
        raise DataError(f"LibriSpeech has no subset {subset!r}: take one of {', '.join(SUBSETS)}")
    final = Path(out_dir) / "LibriSpeech" / subset
    if final.is_dir():
        return final
    work = Path(out_dir) / f".librispeech-{subset}"
    try:
        # A tree that was unpacked in part would pass for a whole one; the archive may stay.
        shutil.rmtree(work / "LibriSpeech", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        from torchaudio.datasets import LIBRISPEECH

        LIBRISPEECH(work, url=subset, download=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / "LibriSpeech" / subset, final)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())
        raise DataError(
            f"LibriSpeech {subset} cannot be fetched into {out_dir} ({reason}): check the network "
            "and the disk space, or unpack the archive from https://www.openslr.org/12 as "
            f"{final}; without a network, `diffbuf data demo` makes a small dataset"
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    return final
