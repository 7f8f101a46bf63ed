"""A failed step is written down, names the first bad value, and fails again anywhere."""

import shutil

import pytest
import torch

from diffbuf_lib.diagnostics.capsule import Capsule
from diffbuf_lib.diffusion.sde import BBED
from diffbuf_lib.errors import NonFiniteError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.networks.conv import ConvNet
from diffbuf_lib.networks.layers import NormAct
from tests.conftest import call, refused
from tests.training.helpers import (
    Clips,
    Hooked,
    clip_of,
    config,
    fit,
    full_disk,
    last,
    same,
    scaled,
)

DROPOUT = "model.dropout=0.3"


def failing(tmp_path, *overrides, error=NonFiniteError, **options):
    """Run until it fails; return the message and the newest capsule's folder."""
    with pytest.raises(error) as caught:
        fit(config(*overrides), tmp_path, valid_set=None, **options)
    message = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    return message, max(tmp_path.glob("capsule_*"), default=None)


def planted(name):
    """A model one of whose weights is NaN."""
    model = DiffusionBufferModel(config(DROPOUT))
    model.get_parameter(name).data[0] = torch.nan
    return model


def found(folder):
    """What the replay of a capsule finds, with the numbers of the failed step."""
    result = Capsule.load(folder).replay()
    assert result.same_numbers
    return result.finding, result


@pytest.mark.law
@pytest.mark.parametrize("cause", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("step", [1, 3])
def test_replay_has_the_numbers_of_the_failed_step(tmp_path, optimizer, step, cause):
    """With dropout, two rounds a step and a model whose V is made of its own estimate."""
    settings = (
        DROPOUT, "training.loss=data_prediction", "training.own_estimate=0.7",
        "training.accumulation_steps=2", "training.batch_size=1", "training.checkpoint_every=1",
        f"training.optimizer={optimizer}", "training.grad_clip=0.5",
    )  # fmt: skip
    if cause == "loss":  # in the second round of the step
        clips, model, again = Clips(8, bad=[clip_of(2 * step, 8)]), None, None
    else:  # the norm of the gradient overflows
        clips, model, again = Clips(8), scaled(config(*settings)), scaled(config(*settings))
        if step > 1:
            fit(config(*settings), tmp_path, steps=step - 1, train_set=clips, valid_set=None)
    _, folder = failing(tmp_path, *settings, train_set=clips, model=model, resume="auto")
    capsule = Capsule.load(folder)
    result = capsule.replay(model=again)
    assert folder.name == f"capsule_{step}"
    assert capsule.record.cause == cause
    assert result.reproduced
    assert result.same_numbers
    assert len(result.losses) == 2
    assert list(map(repr, result.losses)) == list(map(repr, capsule.losses))
    if cause == "gradient":
        assert result.grad_norm == capsule.grad_norm
    assert last(tmp_path)["step"] == step - 1
    assert len(capsule.state["optimizer"]["state"]) > 3 or step == 1
    for name, value in capsule.state.items():
        assert same(value, last(tmp_path)[name]), name


@pytest.mark.law
@pytest.mark.parametrize(
    ("module", "weight"), [("network.layers.0", "weight"), ("network.times.0", "bias")]
)
def test_replay_finds_the_module_of_one_bad_weight(tmp_path, module, weight):
    name = f"{module}.{weight}"
    message, folder = failing(tmp_path, DROPOUT, model=planted(name))
    assert f"First bad value: weight {name}: " in message
    assert f"`diffbuf replay {folder}`" in message
    finding, result = found(folder)
    assert (finding.kind, finding.name) == ("module", module)
    assert weight in finding.detail
    assert [row.finite for row in result.visits] == [True] * (len(result.visits) - 1) + [False]
    assert result.visits[-1].name == module
    assert "first bad value" in str(result)


@pytest.mark.law
def test_one_bad_file_of_an_accumulated_step_is_named_with_its_round(tmp_path):
    settings, clips = ("training.accumulation_steps=3", DROPOUT), Clips(6, bad=[2])
    message, folder = failing(tmp_path, *settings, train_set=clips)
    assert "First bad value: file clip_002.wav: mix holds 1 NaN" in message
    assert "sample 17" in message
    finding, result = found(folder)
    assert finding.name == "clip_002.wav"
    assert "clip_002.wav" in result.capsule.record.files[finding.round]


@pytest.mark.law
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
    assert f"First bad value: sigma t={poisoned[0]:.6g}: " in message
    finding, result = found(folder)
    assert (finding.kind, result.visits[-1].name) == ("sigma", "sigma")
    assert "t_eps" in result.advice


@pytest.mark.law
def test_infinite_gradient_names_where_it_began(tmp_path, monkeypatch):
    """sqrt at 0 in the network's forward pass: a finite loss, an infinite slope."""
    original = ConvNet.forward

    def forward(self, x, t):
        h = original(self, x, t)
        return h + (0 * h).abs().sqrt()

    monkeypatch.setattr(ConvNet, "forward", forward)
    message, folder = failing(tmp_path, DROPOUT)
    assert "the gradient norm is nan" in message
    assert "First bad value: gradient network." in message
    finding, result = found(folder)
    assert (finding.kind, finding.name) == ("gradient", "network.last")
    assert "training.lr" in result.advice


@pytest.mark.parametrize("where", [(torch.optim.Adam, "step"), (NormAct, "forward")])
def test_any_exception_in_a_step_leaves_a_capsule(tmp_path, monkeypatch, where):
    def fail(*args, **options):
        raise RuntimeError("the wheels came off")

    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        message, folder = failing(tmp_path, DROPOUT, error=RuntimeError)
        assert message.startswith("the wheels came off step 1 (epoch 0); batch clip_")
        assert f"Capsule: {folder}" in message
        finding, result = found(folder)
        assert "the wheels came off" in str(result.error)
        if where[1] == "forward":  # the last module that ended before the one that failed
            assert finding.name.startswith("after network.")
    assert not Capsule.load(folder).replay().reproduced


def test_what_fails_in_a_failure_does_not_mask_the_first_error(tmp_path, monkeypatch):
    class Broken(Hooked):
        def trace(self, *args, **options):
            if not torch.is_grad_enabled():  # in the search for the bad stage
                raise RuntimeError("CUDA error: device-side assert triggered")
            return super().trace(*args, **options)

    monkeypatch.setattr("diffbuf_lib.training.failure.json.dumps", full_disk)
    message, folder = failing(tmp_path, model=Broken(config(), after=lambda loss: loss * torch.nan))
    for part in ("the loss is nan", "CUDA error", "No space"):
        assert part in message
    assert folder is None
    assert not list(tmp_path.glob(".*"))


@pytest.mark.law
def test_first_and_two_newest_are_kept(tmp_path):
    with pytest.warns(UserWarning, match="left out"):
        fit(config("training.on_nonfinite=skip"), tmp_path, train_set=Clips(bad=range(7)))
    assert {p.name for p in tmp_path.glob("capsule_*")} == {"capsule_1", "capsule_5", "capsule_6"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = planted("network.last.bias")
    return failing(tmp_path_factory.mktemp("run"), DROPOUT, model=model)[1]


@pytest.mark.law
def test_replay_leaves_the_process_as_it_was(folder):
    capsule, threads = Capsule.load(folder), torch.get_num_threads()
    state = torch.get_rng_state()
    first, second = capsule.replay(), capsule.replay()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert str(first) == str(second)


def test_replay_on_the_command_line_away_from_the_data(folder, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(monkeypatch, capsys, "replay", copy)
    assert status == 0
    assert "module network.last" in out
    assert "same failure: yes; same numbers: yes" in out


def test_damaged_capsules(folder, tmp_path):
    refused(lambda: Capsule.load(tmp_path), "does not exist")
    content, capsule = torch.load(folder / "capsule.pt"), tmp_path / "capsule.pt"
    wide = config("model.base_channels=8").to_dict()
    for change, part in (({"format": 1}, "format 1"), ({"config": wide}, "do not fit")):
        torch.save(content | {"record": content["record"] | change}, capsule)
        refused(lambda: Capsule.load(tmp_path).replay(), part)
    capsule.write_bytes(capsule.read_bytes()[:1000])
    refused(lambda: Capsule.load(tmp_path), "capsule.pt is damaged")
    refused(lambda: Capsule.load(folder).replay("cuda:99"), "cuda:99")
