"""A failed step is written down, names the first bad value, and fails again anywhere."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffbuf_lib.diagnostics.capsule import Capsule
from diffbuf_lib.diffusion.sde import BBED
from diffbuf_lib.errors import CheckpointError, ConfigError, NonFiniteError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import crash
from diffbuf_lib.training.feed import EpochPlan
from tests.training.helpers import Clips, config, fit, last, same

ROOT = Path(__file__).parents[2]
DROPOUT = "model.dropout=0.3"


def failing(tmp_path, *overrides, error=NonFiniteError, **options):
    """Run until it fails; return the message and the newest capsule's folder."""
    with pytest.raises(error) as caught:
        fit(config(*overrides), tmp_path, valid_set=None, **options)
    message = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    folders = sorted(tmp_path.glob("capsule_*"))
    return message, folders[-1] if folders else None


REPLAY = """
import sys
from diffbuf_lib.cli import main
for folder in sys.argv[1:]:
    try:
        main(["replay", folder])
        print("exit status 0")
    except SystemExit as stop:
        print("exit status", stop.code)
    print("=====")
"""


def in_a_fresh_process(*folders):
    """Replay on the command line, with nothing of this process and away from the data."""
    done = subprocess.run(
        [sys.executable, "-c", REPLAY, *map(str, folders)], cwd=folders[0].parent,
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("=====\n")[:-1]


def planted(name):
    """A model one of whose weights is NaN."""
    model = DiffusionBufferModel(config(DROPOUT))
    dict(model.named_parameters())[name].data[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("weight", "module"),
    [("network.layers.0.weight", "network.layers.0"), ("network.times.0.bias", "network.times.0")],
)
def test_nan_in_one_weight_names_its_module(tmp_path, weight, module):
    message, folder = failing(tmp_path, DROPOUT, model=planted(weight))
    assert f"First bad value: module {module}: " in message
    assert f"{weight} is not finite" in message
    assert f"`diffbuf replay {folder}`" in message
    assert folder.name == "capsule_1"
    result = Capsule.load(folder).replay()
    assert result.reproduced
    assert result.same_numbers
    assert (result.finding.kind, result.finding.name) == ("module", module)
    assert [v.bad > 0 for v in result.visits] == [False] * (len(result.visits) - 1) + [True]
    assert result.visits[-1].name == module
    assert "<-- first bad value" in str(result)


def test_nan_in_one_file_names_the_file(tmp_path):
    message, folder = failing(tmp_path, "training.num_epochs=1", train_set=Clips(bad=[4]))
    assert re.search(r"First bad value: file clip_004\.wav: mix holds 1 NaN .* sample 17", message)
    result = Capsule.load(folder).replay()
    assert result.same_numbers
    assert result.finding.name == "clip_004.wav"


def test_nan_in_one_sigma_names_the_time(tmp_path, monkeypatch):
    original, poisoned = BBED.std, []

    def std(self, t):
        sigma = original(self, t)
        if sigma.ndim == 2:  # of a batch, not of the inference schedule
            poisoned.append(t[1, 2].item())
            sigma[1, 2] = torch.nan
        return sigma

    monkeypatch.setattr(BBED, "std", std)
    message, folder = failing(tmp_path)
    assert f"First bad value: sigma t={poisoned[0]:.6g}: sigma is nan at diffusion" in message
    assert "(example 1, buffer frame 2); 1 of 6" in message
    result = Capsule.load(folder).replay()
    assert result.same_numbers
    assert result.finding.kind == "sigma"


def test_weight_file_and_sigma_in_a_fresh_process(tmp_path):
    """Also a first diffusion time that is 0 in float32, and an OUVE that overflows."""
    gamma = ["sde.type=ouve", "sde.diffusion.gamma=1000"]
    cases = [
        (
            r"module network\.first: its output",
            {"model": planted("network.first.weight")},
            [DROPOUT],
        ),
        (r"file clip_00\d\.wav: mix holds 1 NaN", {"train_set": Clips(bad=range(7))}, []),
        (r"sigma t=0: sigma is 0 at diffusion", {}, ["diffusion_buffer.t_eps=1e-60"]),
        (r"sigma t=0\.\d+: sigma is (nan|inf|0) at diffusion time 0", {}, gamma),
    ]
    folders = []
    for i, (expected, options, overrides) in enumerate(cases):
        message, folder = failing(tmp_path / str(i), *overrides, **options)
        assert re.search(f"First bad value: {expected}", message)
        folders.append(folder.rename(tmp_path / f"elsewhere{i}"))
    for (expected, *_), said in zip(cases, in_a_fresh_process(*folders), strict=True):
        assert re.search(f"now:  {expected}", said)
        assert "same failure: yes; same numbers: yes" in said
        assert "exit status 0" in said


def test_infinite_gradient_names_where_it_began(tmp_path, monkeypatch):
    """sqrt at 0 in the network's forward pass: a finite loss, an infinite slope."""
    from diffbuf_lib.networks.conv import ConvNet

    original = ConvNet.forward

    def forward(self, x, t):
        h = original(self, x, t)
        return h + (0 * h).abs().sqrt()

    monkeypatch.setattr(ConvNet, "forward", forward)
    message, folder = failing(tmp_path, DROPOUT)
    assert "but the gradient norm is nan" in message
    assert "First bad value: gradient network.last: " in message
    result = Capsule.load(folder).replay()
    assert result.same_numbers
    assert result.finding.kind == "gradient"


def test_accumulated_step_names_its_round(tmp_path):
    message, folder = failing(
        tmp_path, "training.accumulation_steps=3", DROPOUT, train_set=Clips(6, bad=[2])
    )
    assert "First bad value: file clip_002.wav" in message
    capsule = Capsule.load(folder)
    result = capsule.replay()
    assert result.same_numbers
    assert "clip_002.wav" in capsule.record.files[result.finding.round]


@pytest.mark.parametrize("where", ["forward", "backward", "update"])
def test_any_exception_in_a_step_leaves_a_capsule(tmp_path, monkeypatch, where):
    from diffbuf_lib.networks.layers import NormAct

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("the wheels came off")

    original = NormAct.forward

    def forward(self, x):
        if where == "forward":
            raise RuntimeError("the wheels came off")
        return Broken.apply(original(self, x))

    def step(self, closure=None):
        raise RuntimeError("the wheels came off")

    if where == "update":
        monkeypatch.setattr(torch.optim.Adam, "step", step)
    else:
        monkeypatch.setattr(NormAct, "forward", forward)
    message, folder = failing(tmp_path, DROPOUT, error=RuntimeError)
    assert message.startswith("the wheels came off step 1 (epoch 0), in ")
    assert f"Capsule: {folder}" in message
    if where == "forward":
        assert "in network.norms.0" in message
    report = json.loads((folder / "capsule.json").read_text())
    assert report["error"]["type"] == "RuntimeError"
    assert any("the wheels came off" in line for line in report["traceback"])
    assert any(line.startswith("Current thread") for line in report["stacks"])
    result = Capsule.load(folder).replay()
    assert "the wheels came off" in str(result.error)
    assert result.reproduced or where == "backward"  # its engine thread shows no module
    monkeypatch.undo()
    assert not Capsule.load(folder).replay().reproduced


def test_capsule_holds_the_stages_and_the_whole_state(tmp_path):
    _, folder = failing(tmp_path, DROPOUT, model=planted("network.last.bias"))
    assert {p.name for p in folder.iterdir()} == {
        "capsule.json", "state.json", "batch.safetensors", "state.safetensors",
        "rng.safetensors", "trace.safetensors",
    }  # fmt: skip
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    capsule = Capsule.load(folder)
    assert {"mix", "Y", "S", "t", "sigma", "z", "V", "score", "loss"} <= capsule.trace.keys()
    assert capsule.state.keys() == {"model", "ema", "optimizer", "scheduler", "scaler"}
    assert capsule.cfg == config(DROPOUT)
    assert capsule.batch["0/mix"].shape == (2, 1, 4000)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.law
def test_optimizer_state_survives_packing(tmp_path):
    """What the capsule of step 4 holds is what the checkpoint of step 3 holds."""
    bad = EpochPlan(7, 1, 1, 1, seed=0).order(0)[3]
    settings = ["training.batch_size=1", "training.checkpoint_every=1"]
    _, folder = failing(tmp_path, *settings, train_set=Clips(bad=[bad]))
    state, checkpoint = Capsule.load(folder).state, last(tmp_path)
    assert folder.name == "capsule_4"
    assert checkpoint["step"] == 3
    assert len(state["optimizer"]["state"]) > 3
    for name, value in state.items():
        assert same(value, checkpoint[name]), name


@pytest.mark.law
def test_replay_leaves_the_process_as_it_was(tmp_path):
    _, folder = failing(tmp_path, DROPOUT, model=planted("network.last.bias"))
    capsule, threads = Capsule.load(folder), torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = capsule.replay(), capsule.replay()
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert torch.equal(first.autopsy.trace["V"], second.autopsy.trace["V"])


def test_full_disk_does_not_mask_the_first_error(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(crash, "save_tensors", full)
    message, folder = failing(tmp_path, train_set=Clips(bad=range(7)))
    assert "the loss is nan" in message
    assert "First bad value: file" in message
    assert "No capsule was written: OSError: No space left on device" in message
    assert folder is None
    assert not list(tmp_path.glob(".*"))


def test_a_broken_autopsy_does_not_mask_the_first_error(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("diffbuf_lib.training.failures.walk", broken)
    message, _ = failing(tmp_path, train_set=Clips(bad=range(7)))
    assert "the loss is nan" in message
    assert "Looking closer failed: RuntimeError: CUDA error" in message


@pytest.mark.law
def test_first_and_two_newest_are_kept(tmp_path):
    with pytest.warns(UserWarning, match="left out"):
        fit(
            config("training.on_nonfinite=skip", "training.num_epochs=2"), tmp_path,
            train_set=Clips(bad=range(7)), valid_set=None,
        )  # fmt: skip
    assert {p.name for p in tmp_path.glob("capsule_*")} == {"capsule_1", "capsule_5", "capsule_6"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return failing(tmp_path_factory.mktemp("run"), model=planted("network.last.bias"))[1]


def changed(folder, tmp_path, **changes):
    """A copy of a capsule whose capsule.json says something else."""
    copy = tmp_path / "capsule_1"
    shutil.copytree(folder, copy)
    report = json.loads((copy / "capsule.json").read_text())
    (copy / "capsule.json").write_text(json.dumps(report | changes))
    return copy


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": {"audio": {"rate": 1}}}, ConfigError, "unknown key audio.rate"),
        ({"config": {"model": {"name": "conv", "base_channels": 10**12}}}, CheckpointError, "fit"),
        ({"config": {"model": {"name": "conv", "num_layers": 10**9}}}, CheckpointError, "fit"),
        ({"config": {"audio": {"stft": {"n_fft": 10**9, "win_length": 8, "hop_length": 1}}}},
         CheckpointError, "spectra of"),
        ({"format": 2}, CheckpointError, "format 2"),
        ({"seeds": [[-1, 0]]}, CheckpointError, "seeds"),
        ({"seeds": [[1, 2, 3]]}, CheckpointError, "2 clips have 3 seeds"),
        ({"threads": 10**6}, CheckpointError, "threads"),
        ({"precision": "fp8"}, CheckpointError, "precision"),
        ({"files": [["a"], ["b"]]}, CheckpointError, "not of the same batch"),
    ],
)  # fmt: skip
def test_capsule_of_a_stranger(folder, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        Capsule.load(changed(folder, tmp_path, **change)).replay()


def test_damaged_capsules(folder, tmp_path):
    with pytest.raises(CheckpointError, match="not a capsule"):
        Capsule.load(tmp_path)
    copy = changed(folder, tmp_path)
    rng = load_file(copy / "rng.safetensors")
    save_file(rng | {"torch": torch.zeros(3, dtype=torch.uint8)}, copy / "rng.safetensors")
    with pytest.raises(CheckpointError, match="state is damaged"):
        Capsule.load(copy).replay()
    content = (copy / "batch.safetensors").read_bytes()
    (copy / "batch.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"batch\.safetensors cannot be read"):
        Capsule.load(copy)
    (copy / "capsule.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"capsule\.json cannot be read"):
        Capsule.load(copy)


def test_replay_on_a_missing_gpu(folder):
    with pytest.raises(ConfigError, match="does not exist"):
        Capsule.load(folder).replay("cuda:99")
    with pytest.raises(ConfigError, match="none of"):
        Capsule.load(folder).replay("abacus")
