"""What users give to training that cannot be used: a config, a data set, a file."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from diffbuf_lib.config import load_config
from diffbuf_lib.data import open_dataset
from diffbuf_lib.errors import CheckpointError, ConfigError, DataError, ShapeError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import train
from tests.training.helpers import Clips, config, fit


def write(folder, name="mixture.wav", wave=None, subtype=None, rate=16000):
    """Put a file into the third of four samples of a split."""
    rng = np.random.default_rng(0)
    for i in range(4):
        sample = folder / f"sample_{i:05}"
        if not sample.exists():
            sample.mkdir(parents=True)
            for stem in ("mixture.wav", "vocals.wav"):
                soundfile.write(sample / stem, 0.1 * rng.standard_normal(4000), 16000)
    path = folder / "sample_00002" / name
    soundfile.write(path, np.zeros(4000) if wave is None else wave, rate, subtype=subtype)
    return path


def train_on(folder, after_a_step=None):
    dataset = open_dataset(1, folder, config(), training=True)
    with tempfile.TemporaryDirectory() as results:
        for _ in train(config(), dataset, None, results, device="cpu"):
            if after_a_step is not None:
                after_a_step()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["diffusion_buffer.t_eps=0"], ["diffusion_buffer.t_eps"]),
        (["diffusion_buffer.t_max=1.2"], ["diffusion_buffer.t_max"]),
        (["diffusion_buffer.buffer_size=80"], ["diffusion_buffer.buffer_size", "80", "65"]),
        (["audio.chunk_size=50", "audio.stft.center=false"], ["at least 1", "50"]),
    ],
)
def test_config_that_cannot_work(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("training: {lrr: 1}", "did you mean training.lr?"),
        ("training: {lr: fast}", "training.lr"),
        ("training: !!python/object/apply:os.mkdir ['{made}']", "not plain YAML"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path, text, part):
    made = tmp_path / "made"
    (tmp_path / "c.yaml").write_text(text.replace("{made}", str(made)))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert part in str(caught.value)
    assert not made.exists()


def nan_wave():
    wave = np.zeros(4000)
    wave[17] = np.nan
    return wave


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ({"wave": np.zeros((4000, 2))}, ["mixture.wav", "2 channels"]),
        ({"wave": nan_wave(), "subtype": "FLOAT"}, ["mixture.wav", "1 NaN"]),
        ({"name": "vocals.wav", "wave": np.zeros(3000)}, ["vocals.wav", "3000"]),
        ({"name": "vocals.flac"}, ["vocals.wav", "vocals.flac"]),
        ({"rate": 8000}, ["8000", "16000", "audio.sample_rate"]),
    ],
)
def test_file_that_does_not_fit(tmp_path, file, parts):
    write(tmp_path, **file)
    if file.get("rate"):
        write(tmp_path, name="vocals.wav", rate=file["rate"])
    with pytest.raises(DataError) as caught:
        train_on(tmp_path)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"RIFF\x10\x00\x00\x00" + bytes(range(100)), "half of a flac"]
)
def test_damaged_file_is_named(tmp_path, content):
    path = write(tmp_path)
    if isinstance(content, str):
        path.unlink()
        noise = 0.1 * np.random.default_rng(0).standard_normal(4000)
        path = write(tmp_path, "mixture.flac", noise)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(DataError, match=path.name):
        train_on(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"sample_\*/"):
        open_dataset(1, tmp_path, config(), training=True)
    write(tmp_path)
    with pytest.raises(DataError, match=r"mixture\.wav does not exist"):
        train_on(tmp_path, lambda: [shutil.rmtree(path) for path in tmp_path.glob("sample_*")])


def test_clip_without_its_batch_axis():
    mix, target = Clips()[0]
    with pytest.raises(ShapeError, match=r"unsqueeze"):
        DiffusionBufferModel(config())(mix, target)


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
        write(public / "data").chmod(0)
        with pytest.raises(DataError, match=r"mixture\.wav .*Permission denied"):
            train_on(public / "data")
        (public / "results").mkdir(mode=0)
        with pytest.raises(CheckpointError, match=r"Permission denied.*--results_path"):
            fit(config(), public / "results")
