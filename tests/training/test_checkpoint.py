"""Checkpoint files: whole or not there, and read without running what is in them."""

import os
import pickle
import resource
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import load_checkpoint, load_weights, save_checkpoint, train
from diffbuf_lib.training.folder import KEYS, ResultsFolder
from tests.conftest import refused
from tests.training.helpers import Clips, config, fit, full_disk, last, same


def state(value=1.0, **changes):
    plain = dict.fromkeys(KEYS - {"format"}) | {"version": "0"}
    return plain | {"model": {"w": torch.full((99,), value)}} | changes


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, state())
    return path


@pytest.mark.law
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_full_disk_in_a_run_leaves_the_older_checkpoint(tmp_path, monkeypatch, name):
    cfg = config("training.checkpoint_every=2")
    run = train(cfg, Clips(), None, tmp_path, device="cpu")
    next(run)
    monkeypatch.setattr(os, name, full_disk)
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be written .*No space left"):
        next(run)
    monkeypatch.undo()
    assert os.listdir(tmp_path / "checkpoints") == ["last.pt"]
    assert last(tmp_path)["step"] == 0
    assert len(fit(cfg, tmp_path, resume=True)) == 6


@pytest.mark.law
def test_full_disk_in_the_middle_of_the_file(path):
    """A real one: the system refuses to let a file grow beyond 16 kB."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"last\.pt cannot be written"):
            save_checkpoint(path, state(2.0, ema=torch.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert same(load_checkpoint(path), state(format=1))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.law
def test_checkpoint_is_on_the_disk_before_it_takes_its_name(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    save_checkpoint(path, state())
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
def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    path, target = tmp_path / "last.pt", tmp_path / "pwned"
    monkeypatch.setenv("DIFFBUF_TEST_TARGET", str(target))
    path.write_bytes(pickle.dumps({"model": Malicious()}))  # which torch.load would take
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    torch.save(state(config=Malicious()), path)
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the test's file must be able to do harm"


def begin(path, start, model):
    """Make one step of nearly no size from given weights; return the weights."""
    cfg = model.cfg.override("training.lr=1e-30")
    fit(cfg, path, steps=1, valid_set=None, start_check_point=start, model=model)
    return dict(model.state_dict())


@pytest.mark.law
def test_weights_only_start(tmp_path):
    """Averaged weights, no optimizer, from a checkpoint and from the exported folder."""
    fit(config("training.metric_for_scheduler=loss", "training.num_epochs=1"), tmp_path / "a")
    source = tmp_path / "a" / "checkpoints" / "best.pt"
    averaged = load_weights(source)
    assert not same(averaged, load_checkpoint(source)["model"])
    for i, start in enumerate((source, tmp_path / "a" / "model")):
        assert same(begin(tmp_path / f"b{i}", start, DiffusionBufferModel(config())), averaged)
        assert last(tmp_path / f"b{i}")["step"] == 1


FOREIGN = {  # what others put before our names
    "plain": ("", ""),
    "ddp": ("module.", ""),
    "compiled": ("_orig_mod.", ""),
    "compiled in ddp": ("module._orig_mod.", ""),
    "compiled network": ("network._orig_mod.", "network."),
    "lightning": ("model.", ""),
    "bare network": ("", "network."),
}


@pytest.mark.law
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_run_starts_with_what_others_save(tmp_path, kind, suffix):
    own = dict(DiffusionBufferModel(config("model.base_channels=8")).state_dict())
    path, (ahead, off) = tmp_path / f"theirs{suffix}", FOREIGN[kind]
    weights = {ahead + name.removeprefix(off): value.contiguous() for name, value in own.items()}
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": weights} if kind == "lightning" else weights, path)
    else:
        save_file(weights, path)
    started = begin(tmp_path / "run", path, DiffusionBufferModel(config("model.base_channels=8")))
    torch.testing.assert_close(started, own, rtol=0, atol=1e-20)


def test_weights_that_do_not_fit_are_named(tmp_path):
    fit(config(), tmp_path / "a", steps=1)
    for change, start, part in (
        ("model.base_channels=8", "checkpoints/last.pt", "shape"),
        ("model.num_layers=2", "model", "Missing key"),
        ("model.base_channels=8", "checkpoints", "model.safetensors"),
    ):
        begun = partial(fit, config(change), start_check_point=tmp_path / "a" / start)
        refused(partial(begun, tmp_path / "b"), part)
    assert not list(tmp_path.glob("b/*"))


@pytest.mark.law
def test_half_made_swap_of_the_model_is_undone(tmp_path):
    for name in (".model.old", ".model.new"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model.old" / "model.safetensors").write_text("whole")
    ResultsFolder(tmp_path).tidy()
    assert (tmp_path / "model" / "model.safetensors").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.zeros(2), None])
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "other.pt"
    if content is not None:
        torch.save(content, path)
    refused(lambda: load_checkpoint(path), path)
    refused(lambda: load_weights(path), path)


def test_a_checkpoint_of_a_newer_library(tmp_path):
    torch.save(state(format=99, version="9.9"), tmp_path / "last.pt")
    refused(lambda: load_checkpoint(tmp_path / "last.pt"), "format 99", "diffbuf 9.9")


def test_an_older_checkpoint_still_gives_first_weights(tmp_path):
    fit(config(), tmp_path / "run", steps=1)
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    weights = load_weights(path)
    del state["global_batch"]
    torch.save(state, path)
    assert load_weights(path).keys() == weights.keys()
    refused(lambda: load_checkpoint(path), path, "--start_check_point")
