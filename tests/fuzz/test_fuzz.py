"""Whatever a file holds: an error of ours, on one line and in time, or a result."""

from __future__ import annotations

import io
import json
import os
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
from diffbuf_lib.data import DNLMDataset, build_demo, build_dnlm
from diffbuf_lib.data.audio import read_audio, read_info
from diffbuf_lib.diagnostics.capsule import Capsule
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.errors import DataError, DiffbufError
from diffbuf_lib.training import load_checkpoint, load_weights, save_checkpoint
from diffbuf_lib.training.folder import ResultsFolder, read_history
from tests.training.helpers import Clips, config, fit

SECONDS = 10  # in which any input must be done with


def fuzz(fast: int, long: int):
    """Run a hypothesis test on few inputs, and a slow twin of it on many."""

    def decorate(strategy):
        def wrap(function):
            def check(count):
                options = settings(
                    max_examples=count, deadline=SECONDS * 1000, database=None,
                    derandomize=count == fast, suppress_health_check=list(HealthCheck),
                )  # fmt: skip
                options(given(strategy)(function))()

            def test(count):
                check(count)

            return pytest.mark.timeout(1200)(
                pytest.mark.parametrize(
                    "count", [fast, pytest.param(long, marks=pytest.mark.slow)]
                )(test)
            )

        return wrap

    return decorate


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
    """Bytes near `content`: some replaced, a part cut out, moved or doubled."""
    place = st.integers(0, len(content) - 1)

    def apply(edits):
        data = bytearray(content)
        for kind, where, much, value in edits:
            where %= max(len(data), 1)
            if kind == 0 and data:
                data[where] = value
            elif kind == 1:
                del data[where : where + much]
            elif kind == 2:
                data[where:where] = bytes([value]) * (much % 64)
            elif kind == 3:
                data[where : where + 4] = (2**32 - 1 - value).to_bytes(4, "little")
            else:
                del data[where:]
        return bytes(data)

    head = st.integers(0, min(80, len(content) - 1))  # headers are where it hurts
    edit = st.tuples(st.integers(0, 4), place | head, st.integers(1, 400), st.integers(0, 255))
    return st.lists(edit, min_size=1, max_size=6).map(apply)


# Configs.

KEYS = [key for key, *_ in describe_keys()]
VALUES = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 70) | st.floats()
    | st.sampled_from([0, 1, -1, 1e-300, 1e300, 10**30, "bbed", "ouve", "conv", "ncsnpp", "nan"])
    | st.text(max_size=5) | st.lists(st.integers(-1, 4), max_size=4)
    | st.dictionaries(st.text(max_size=5), st.integers(), max_size=2)
)  # fmt: skip
TREES = st.recursive(
    VALUES,
    lambda node: st.dictionaries(
        st.sampled_from(["audio", "stft", "model", "sde", "type", "diffusion", "training", "lr"])
        | st.text(max_size=4) | st.integers(),
        node, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


def use(cfg: Config) -> None:
    """What the first minute of a run computes from a config, but for the network."""
    assert build_config(cfg.to_dict()) == cfg
    assert cfg.to_yaml()
    assert cfg.leading_zero_samples >= 0
    buffer = cfg.diffusion_buffer
    t = torch.tensor([buffer.t_eps, (buffer.t_eps + buffer.t_max) / 2, buffer.t_max])
    make_sde(cfg.sde).std(t)


@fuzz(60, 3000)(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4))
def test_config_values(changes):
    with only_our_errors():
        cfg = Config()
        for key, value in changes:
            try:
                text = json.dumps(value)
            except ValueError:
                text = str(value)
            cfg = cfg.override(f"{key}={text}")
        use(cfg)


@fuzz(30, 1500)(TREES)
def test_config_trees(tree):
    with only_our_errors():
        if isinstance(tree, dict):
            use(build_config(tree))


@fuzz(40, 2000)(
    st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | mutated(yaml.safe_dump(config().to_dict()).encode())
    | st.lists(
        st.sampled_from(["a: ", "- ", "{", "[", "&a ", "*a", "!!", "2001-99-99", "\n", "  ",
                         "<<: ", "? ", "0b", "0o9", "1:99", "!!int x", "!!float .", "~"]),
        max_size=12,
    ).map(lambda parts: "".join(parts).encode())
)  # fmt: skip
def test_config_files(content):
    with tempfile.TemporaryDirectory() as folder, only_our_errors():
        path = Path(folder) / "c.yaml"
        path.write_bytes(content)
        use(load_config(path))


@pytest.mark.parametrize(
    "text",
    ["a: 2001-99-99", "[" * 5000, "a: 0b", "{[1]: 2}", "? {a: 1}\n: 2", "1: 2", "a: !!binary =",
     "a: &a [*a]", "training: &a {lr: *a}", "- 1", "sde: {type: {}}", "sde: [1]", "training: 3",
     "sde: {diffusion: {k: 1.0e+300}}", "sde: {diffusion: {k: 1.0e-300}}", "\0", "a: !!timestamp x",
     "sde: {type: bbed, diffusion: {c: 1.0e+200}}", "training: {seed: 1" + "0" * 5000 + "}",
     "sde: {type: ouve, diffusion: {sigma_min: 1.0e-300, sigma_max: 1.0e+300}}"],
    ids=range(20),
)  # fmt: skip
def test_config_files_that_were_trouble(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with only_our_errors():
        use(load_config(tmp_path / "c.yaml"))


@pytest.mark.parametrize("inner", ["{}", "{{{}}}", "[{}]"])
def test_aliases_that_unfold_without_end_take_no_time(tmp_path, inner):
    """A billion laughs: ten lines of YAML, ten to the ninth values."""
    lines = ["l0: &l0 [lol, lol]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10)]
    for text in ("\n".join([*lines, "training: {lr: *l9}"]), f"- {lines[0][4:]}"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(DiffbufError) as caught:
            load_config(tmp_path / "c.yaml")
        assert len(str(caught.value)) < 5000


# Audio.


def audio_bytes(kind: str, subtype: str) -> bytes:
    file = io.BytesIO()
    wave = 0.1 * np.random.default_rng(0).standard_normal((700, 2))
    soundfile.write(file, wave, 16000, format=kind, subtype=subtype)
    return file.getvalue()


def read_everything(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        with only_our_errors():
            info = read_info(path)
            assert info.frames >= 1
        with only_our_errors():
            wave, _ = read_audio(path)
            assert wave.isfinite().all()
        sample = Path(folder) / "sample_0"
        sample.mkdir()
        for stem in ("mixture", "vocals"):
            (sample / f"{stem}{path.suffix}").write_bytes(content)
        with only_our_errors():
            mix, _target = DNLMDataset(folder, 500, sample_rate=16000)[0]
            assert mix.shape[1] == 500


@fuzz(60, 2500)(
    mutated(audio_bytes("WAV", "PCM_16")) | mutated(audio_bytes("WAV", "FLOAT")) | st.binary()
)
def test_wav_bytes(content):
    read_everything("a.wav", content)


@fuzz(30, 1000)(mutated(audio_bytes("FLAC", "PCM_16")))
def test_flac_bytes(content):
    read_everything("a.flac", content)


def test_flac_that_promises_a_terabyte(tmp_path):
    content = bytearray(audio_bytes("FLAC", "PCM_16"))
    content[21] |= 0x0F  # the top bits of the number of samples in STREAMINFO
    content[22:26] = b"\xff" * 4
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(DataError):
        read_audio(tmp_path / "a.flac")


# JSON that an earlier build has left.

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=6),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3),
    max_leaves=8,
)  # fmt: skip
TEXTS = JSON.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=30)


@fuzz(20, 500)(TEXTS)
def test_markers_of_a_build(content):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "speech").mkdir()
        (root / "noise").mkdir()
        for marker, build in (
            ("demo.json", lambda: build_demo(root / "out", train=1, valid=1)),
            ("build.json", lambda: build_dnlm(root / "speech", root / "noise", root / "out")),
        ):
            (root / "out").mkdir(exist_ok=True)
            (root / "out" / marker).write_bytes(content)
            with only_our_errors():
                build()


@fuzz(20, 500)(st.lists(TEXTS, max_size=4).map(b"\n".join))
def test_history(content):
    with tempfile.TemporaryDirectory() as folder:
        results = ResultsFolder(folder)
        results.history.write_bytes(content)
        with only_our_errors():
            results.truncate_history(3, validated=True)
            assert all(line["step"] <= 3 for line in read_history(results.history))


# Checkpoints and capsules.


def _checkpoint_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "c.pt", {"model": {"w": torch.ones(3)}, "step": 1})
        return (Path(folder) / "c.pt").read_bytes()


@fuzz(40, 1000)(mutated(_checkpoint_bytes()))
def test_checkpoint_bytes(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.pt"
        path.write_bytes(content)
        with only_our_errors():
            load_checkpoint(path)
        (Path(folder) / "model.safetensors").write_bytes(content)
        with only_our_errors():
            load_weights(folder)


@pytest.fixture(scope="module")
def capsule_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capsule")
    with only_our_errors():
        fit(config(), folder, train_set=Clips(bad=range(7)), valid_set=None)
    return folder / "capsule_1"


@pytest.mark.parametrize("count", [15, pytest.param(600, marks=pytest.mark.slow)])
def test_capsules(capsule_folder, tmp_path, count):
    rng = np.random.default_rng(count)
    os.link(capsule_folder / "capsule.json", tmp_path / "capsule.json")
    for _ in range(count):
        content = bytearray((capsule_folder / "capsule.pt").read_bytes())
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        (tmp_path / "capsule.pt").write_bytes(content)
        with only_our_errors():
            Capsule.load(tmp_path).replay()
