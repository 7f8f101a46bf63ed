"""Checkpoint files: whole or not there, and read without running what is in them."""

import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import load_checkpoint, load_weights, save_checkpoint, train
from diffbuf_lib.training.folder import KEYS, ResultsFolder
from tests.training.helpers import Clips, config, fit, full_disk, last, same


def state(value=1.0):
    return dict.fromkeys(KEYS) | {"version": "0", "model": {"w": torch.full((99,), value)}}


def save(path, value=1.0):
    save_checkpoint(path, {k: v for k, v in state(value).items() if k != "format"})


def stored(path):
    return load_checkpoint(path)["model"]["w"][0].item()


def assert_as_before(path):
    assert stored(path) == 1
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    save(path)
    return path


@pytest.mark.law
def test_round_trip(path):
    assert same(load_checkpoint(path), state() | {"format": 1})


@pytest.mark.law
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_full_disk_keeps_the_old_checkpoint(path, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full_disk)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            save(path, 2.0)
    assert str(path) in str(caught.value)
    assert_as_before(path)
    save(path, 3.0)
    assert stored(path) == 3


@pytest.mark.law
def test_full_disk_in_the_middle_of_the_file(path):
    """A real one: the system refuses to let a file grow beyond 16 kB."""
    import resource
    import signal

    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"last\.pt cannot be written"):
            save_checkpoint(path, state() | {"ema": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert_as_before(path)


@pytest.mark.law
def test_checkpoint_is_on_the_disk_before_it_takes_its_name(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    save(path, 2.0)
    assert calls == ["fsync", "replace", "fsync"]  # file, rename, folder


def one_bit(content):
    content = bytearray(content)
    content[content.index(torch.ones(99).numpy().tobytes()) + 20] ^= 1
    return content


@pytest.mark.law
@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:10], lambda b: b[: len(b) // 2], lambda b: b[:-30], one_bit],
)
def test_damaged_file(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="damaged or cut short") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, (os.environ["DIFFBUF_TEST_TARGET"],))


@pytest.mark.law
@pytest.mark.parametrize("plain", [True, False])
def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch, plain):
    target = tmp_path / "pwned"
    monkeypatch.setenv("DIFFBUF_TEST_TARGET", str(target))
    path = tmp_path / "last.pt"
    if plain:  # a bare pickle, which torch.load would take
        path.write_bytes(pickle.dumps({"model": Malicious()}))
    else:
        torch.save(state() | {"config": Malicious()}, path)
    with pytest.raises(CheckpointError, match=r"refused|damaged"):
        load_checkpoint(path)
    assert not target.exists()
    if not plain:
        with warnings.catch_warnings():
            torch.load(path, weights_only=False)
        assert target.exists(), "the test's file must be able to do harm"


@pytest.mark.law
def test_full_disk_in_a_run_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    run = train(config("training.checkpoint_every=2"), Clips(), None, tmp_path, device="cpu")
    next(run)
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        next(run)
    monkeypatch.undo()
    assert last(tmp_path)["step"] == 0
    assert len(fit(config("training.checkpoint_every=2"), tmp_path, resume=True)) == 6


@pytest.mark.law
def test_weights_only_start(tmp_path):
    """Averaged weights, no optimizer, from a checkpoint and from the exported folder."""
    fit(config("training.metric_for_scheduler=loss", "training.num_epochs=1"), tmp_path / "a")
    source = tmp_path / "a" / "checkpoints" / "best.pt"
    averaged = load_weights(source)
    assert not same(averaged, load_checkpoint(source)["model"])
    for i, start in enumerate((source, tmp_path / "a" / "model")):
        model = DiffusionBufferModel(config())
        assert begin(tmp_path / f"b{i}", start, model).step == 1
        assert same(dict(model.state_dict()), averaged)


def begin(path, start, model):
    """Make one step of nearly no size from given weights."""
    cfg = model.cfg.override("training.lr=1e-30")
    return fit(cfg, path, steps=1, valid_set=None, start_check_point=start, model=model)[0]


FOREIGN = {
    "plain": lambda own: own,
    "module": lambda own: {f"module.{name}": value for name, value in own.items()},
    "compiled": lambda own: {f"_orig_mod.{name}": value for name, value in own.items()},
    "compiled in ddp": lambda own: {f"module._orig_mod.{n}": v for n, v in own.items()},
    "compiled network": lambda own: {f"network._orig_mod.{n[8:]}": v for n, v in own.items()},
    "lightning": lambda own: {"epoch": 3, "state_dict": {f"model.{n}": v for n, v in own.items()}},
    "bare network": lambda own: {n.removeprefix("network."): v for n, v in own.items()},
}  # fmt: skip


@pytest.mark.law
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_run_starts_with_what_others_save(tmp_path, kind, suffix):
    own = DiffusionBufferModel(config("model.base_channels=8")).state_dict()
    path, weights = tmp_path / f"theirs{suffix}", FOREIGN[kind](own)
    if suffix == ".pt":
        torch.save(weights, path)
    else:
        plain = weights.get("state_dict", weights)
        save_file({name: value.contiguous() for name, value in plain.items()}, path)
    model = DiffusionBufferModel(config("model.base_channels=8"))
    begin(tmp_path / "run", path, model)
    torch.testing.assert_close(dict(model.state_dict()), dict(own), rtol=0, atol=1e-20)


def test_weights_that_do_not_fit_are_named(tmp_path):
    fit(config(), tmp_path / "a", steps=1)
    for change, start, part in (
        ("model.base_channels=8", "checkpoints/last.pt", r"network\.\S+:.* shape"),
        ("model.num_layers=2", "model", r"Missing key.*network\."),
        ("model.base_channels=8", "checkpoints", r"no model\.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=part):
            fit(config(change), tmp_path / "b", start_check_point=tmp_path / "a" / start)
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


@pytest.mark.law
def test_half_made_swap_of_the_model_is_undone(tmp_path):
    folder = ResultsFolder(tmp_path)
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "model.safetensors").write_text("whole")
    (tmp_path / ".model.new").mkdir()
    folder.tidy()
    assert (tmp_path / "model" / "model.safetensors").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("content", "part"),
    [({"state_dict": {}}, "not a training checkpoint"), (torch.zeros(2), "not a training"),
     (state() | {"format": 99, "version": "9.9"}, "format 99"), (None, "does not exist")],
)  # fmt: skip
def test_files_that_are_no_checkpoints(tmp_path, content, part):
    path = tmp_path / "other.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=part):
        load_checkpoint(path)
    if part.startswith("not"):
        with pytest.raises(CheckpointError, match="no weights"):
            load_weights(path)
