"""Files that fail while a run reads them; `tests/data` has what is wrong with files as such."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from diffbuf_lib.data import open_dataset
from diffbuf_lib.errors import CheckpointError, DataError
from diffbuf_lib.training import train
from tests.training.helpers import config, fit


def write_split(folder):
    """Write a split of four samples; return the mixture of the third."""
    rng = np.random.default_rng(0)
    for i in range(4):
        sample = folder / f"sample_{i:05}"
        sample.mkdir(parents=True)
        for name in ("mixture.wav", "vocals.wav"):
            soundfile.write(sample / name, 0.1 * rng.standard_normal(4000), 16000)
    return folder / "sample_00002" / "mixture.wav"


def train_on(folder, after_a_step=lambda: None):
    dataset = open_dataset(1, folder, config(), training=True)
    with tempfile.TemporaryDirectory() as results:
        for _ in train(config(), dataset, None, results, device="cpu"):
            after_a_step()


@pytest.mark.parametrize("content", [b"", b"RIFF\x10\x00\x00\x00" + bytes(range(100))])
def test_damaged_file_is_named(tmp_path, content):
    write_split(tmp_path).write_bytes(content)
    with pytest.raises(DataError, match=r"mixture\.wav") as caught:
        train_on(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_vanish_in_mid_epoch(tmp_path):
    write_split(tmp_path)
    with pytest.raises(DataError, match=r"mixture\.wav does not exist"):
        train_on(tmp_path, lambda: [shutil.rmtree(path) for path in tmp_path.glob("sample_*")])


@contextmanager
def as_nobody():
    """Lay down the super-user's rights, to whom nothing is forbidden; give a folder to write in."""
    user = os.geteuid()
    public = Path(tempfile.mkdtemp())
    try:
        if user == 0:
            os.chown(public, 65534, 65534)
            os.seteuid(65534)
        yield public
    finally:
        if user == 0:
            os.seteuid(0)
        for path in [public, *public.rglob("*")]:
            path.chmod(0o700)
        shutil.rmtree(public)


def test_permission_denied():
    with as_nobody() as public:
        write_split(public / "data").chmod(0)
        with pytest.raises(DataError, match=r"mixture\.wav .*Permission denied"):
            train_on(public / "data")
        (public / "results").mkdir(mode=0)
        with pytest.raises(CheckpointError, match=r"Permission denied.*--results_path"):
            fit(config(), public / "results")
