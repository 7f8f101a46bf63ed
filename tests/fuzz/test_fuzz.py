"""Whatever a file holds: an error of ours, on one line and in time, or a result."""

from __future__ import annotations

import io
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffbuf_lib.config import Config, build_config, describe_keys, load_config
from diffbuf_lib.data.audio import read_audio, read_info
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.errors import DataError, DiffbufError
from diffbuf_lib.training import load_checkpoint, load_weights
from tests.training.helpers import config

SECONDS = 10  # in which any input must be done with


def fuzz(strategy, fast: int, long: int):
    """Run a hypothesis test on few inputs, and a slow twin of it on many."""

    def wrap(check):
        def test(count):
            options = settings(
                max_examples=count, deadline=SECONDS * 1000, database=None,
                derandomize=count == fast, suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            options(given(strategy)(check))()  # anew: a test takes settings once

        counts = [fast, pytest.param(long, marks=pytest.mark.slow)]
        return pytest.mark.timeout(1200)(pytest.mark.parametrize("count", counts)(test))

    return wrap


@contextmanager
def only_our_errors():
    message = ""
    try:
        yield
    except DiffbufError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 5000


def mutated(content: bytes):
    """Bytes near `content`: some replaced, inserted or cut out, or all cut off."""
    end = len(content)
    place = st.integers(0, end) | st.integers(0, min(80, end))  # headers are where it hurts
    much = st.sampled_from([0, 1, 4, end]) | st.integers(0, 400)
    new = st.binary(max_size=4) | st.sampled_from([b"\xff" * 4, b"\xff" * 7 + b"\x7f", bytes(64)])

    def apply(edits):
        data = content
        for where, cut, put in edits:
            data = data[:where] + put + data[where + cut :]
        return data

    return st.lists(st.tuples(place, much, new), min_size=1, max_size=6).map(apply)


KEYS = [key for key, *_ in describe_keys()]
VALUES = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 70) | st.floats()
    | st.sampled_from([0, 1, -1, 1e-300, 1e300, 10**30, "bbed", "ouve", "conv", "ncsnpp", "nan"])
    | st.text(max_size=5) | st.lists(st.integers(-1, 4), max_size=4)
    | st.dictionaries(st.text(max_size=5), st.integers(), max_size=2)
)  # fmt: skip
SYNTAX = st.sampled_from(
    ["a: ", "- ", "{", "[", "&a ", "*a", "!!", "2001-99-99", "\n", "  ", "<<: ", "? ", "0b", "0o9",
     "1:99", "!!int x", "!!float .", "~"]
)  # fmt: skip
FILES = (
    st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | mutated(yaml.safe_dump(config().to_dict()).encode())
    | st.lists(SYNTAX, max_size=12).map(lambda parts: "".join(parts).encode())
)


def use(cfg: Config) -> None:
    """What the first minute of a run computes from a config, but for the network."""
    assert build_config(cfg.to_dict()) == cfg
    assert cfg.to_yaml()
    assert cfg.leading_zero_samples >= 0
    buffer = cfg.diffusion_buffer
    t = torch.tensor([buffer.t_eps, (buffer.t_eps + buffer.t_max) / 2, buffer.t_max])
    make_sde(cfg.sde).std(t)


@fuzz(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4), 60, 3000)
def test_config_values(changes):
    with only_our_errors():
        use(Config().override(*(f"{key}={json.dumps(value)}" for key, value in changes)))


@fuzz(FILES, 40, 2000)
def test_config_files(content):
    with tempfile.TemporaryDirectory() as folder, only_our_errors():
        path = Path(folder) / "c.yaml"
        path.write_bytes(content)
        use(load_config(path))


# A billion laughs: ten lines of YAML, ten to the ninth values.
LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    "text",
    ["a: 2001-99-99", "[" * 5000, "a: 0b", "{[1]: 2}", "? {a: 1}\n: 2", "1: 2", "a: !!binary =",
     "a: &a [*a]", "training: &a {lr: *a}", "- 1", "sde: {type: {}}", "sde: [1]", "training: 3",
     "sde: {diffusion: {k: 1.0e+300}}", "sde: {diffusion: {k: 1.0e-300}}", "\0", "a: !!timestamp x",
     "sde: {type: bbed, diffusion: {c: 1.0e+200}}", "training: {seed: 1" + "0" * 5000 + "}",
     "sde: {type: ouve, diffusion: {sigma_min: 1.0e-300, sigma_max: 1.0e+300}}",
     f"l0: &l0 [lol, lol]\n{LAUGHS}training: {{lr: *l9}}"],
    ids=range(21),
)  # fmt: skip
def test_config_files_that_were_trouble(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with only_our_errors():
        use(load_config(tmp_path / "c.yaml"))


def audio_bytes(kind: str, subtype: str) -> bytes:
    file = io.BytesIO()
    wave = 0.1 * np.random.default_rng(0).standard_normal((700, 2))
    soundfile.write(file, wave, 16000, format=kind, subtype=subtype)
    return file.getvalue()


def checkpoint_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"w": torch.ones(3)}, "step": 1}, file)
    return file.getvalue()


AUDIO = [audio_bytes("WAV", "PCM_16"), audio_bytes("WAV", "FLOAT"), audio_bytes("FLAC", "PCM_16")]


@fuzz(st.one_of(*map(mutated, AUDIO), st.binary()), 90, 3500)
def test_audio_bytes(content):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mixture.wav", "vocals.flac"):  # what is in a file counts, not its name
            path = Path(folder) / name
            path.write_bytes(content)
            with only_our_errors():
                assert read_info(path).frames >= 1
            with only_our_errors():
                assert read_audio(path)[0].isfinite().all()


def test_flac_that_promises_a_terabyte(tmp_path):
    content = bytearray(audio_bytes("FLAC", "PCM_16"))
    content[21] |= 0x0F  # the top bits of the number of samples in STREAMINFO
    content[22:26] = b"\xff" * 4
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(DataError):
        read_audio(tmp_path / "a.flac")


@fuzz(mutated(checkpoint_bytes()), 40, 1000)
def test_checkpoint_bytes(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"  # which is looked for in a folder
        path.write_bytes(content)
        for load, source in ((load_checkpoint, path), (load_weights, folder)):
            with only_our_errors():
                load(source)
