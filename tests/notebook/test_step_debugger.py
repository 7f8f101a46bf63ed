"""The step debugger without a browser: its steps are those of training, and Back is exact."""

import copy
import io

import pytest
import soundfile
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.training.feed import Batch
from diffbuf_lib.training.step import Engine, make_accelerator
from tests.conftest import TINY, make_model
from tests.notebook.conftest import batch
from tests.training.helpers import same
from walk.step_debugger import StepDebugger, stage_wave


@pytest.fixture
def cfg():
    return build_config(TINY, ["model.dropout=0.2", "training.grad_clip=0.5"])


def state(panel):
    return copy.deepcopy((panel.model.state_dict(), panel.optimizer.state_dict()))


@pytest.mark.law
def test_back_to_start_restores_weights_optimizer_and_noise(cfg):
    model = make_model(cfg)
    generator = torch.get_rng_state()
    panel = StepDebugger(model, *batch(), lr=1e-2)
    start, first = state(panel), panel.trace
    panel.step(3)
    losses, later = list(panel.losses), state(panel)
    assert not same(start, later)
    panel.reset()
    assert same(state(panel), start)
    assert torch.equal(panel.trace.loss, first.loss)
    assert not panel.gradient_norms
    assert all(p.grad is None for p in panel.model.parameters())
    panel.step(3)
    assert panel.losses == losses
    assert same(state(panel), later)
    panel.reset()
    assert same(state(panel), start), "what is restored is a copy"
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.law
def test_a_step_is_that_of_training(cfg):
    """The same loss, gradient norm and weights as `Engine.step`, clipping included."""
    cfg = build_config(cfg.to_dict(), ["model.dropout=0.0"])
    mix, target = batch()
    panel = StepDebugger(make_model(cfg), mix, target)
    engine = Engine(cfg, make_model(cfg), make_accelerator(cfg.training, "cpu"), 10)
    for _ in range(3):
        outcome = engine.step([Batch(mix, target, panel.noise())])
        assert panel.step() == pytest.approx(outcome.loss, rel=1e-6)
        assert panel.gradients.norm == pytest.approx(outcome.grad_norm, rel=1e-5)
    for mine, theirs in zip(panel.model.parameters(), engine.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("override", ["training.seed=0", "preprocessing.level_seconds=1"])
def test_every_stage_of_every_example_can_be_opened(cfg, override):
    panel = StepDebugger(make_model(cfg.override(override)), *batch())
    assert panel.stage.options == tuple(panel.trace.stages())
    pictures = {panel.image.value}
    panel.example.value = 1
    for name in panel.stage.options:
        panel.stage.value = name
        pictures.add(panel.image.value)
    assert len(pictures) == len(panel.stage.options) + 1


def test_sound_where_a_stage_has_one(cfg):
    """A spectrum is heard as the signal it was made of; what is no sound has no player."""
    mix, target = batch()
    panel = StepDebugger(make_model(cfg), mix, target)
    for name, wave in (("mix", mix), ("Y", mix), ("target", target), ("S", target)):
        heard = stage_wave(panel.model, panel.trace, name, 1)
        torch.testing.assert_close(heard, wave[1, 0], atol=1e-4, rtol=1e-3)
    for name in ("t", "sigma", "z", "score", "target_score", "loss_map", "loss"):
        assert stage_wave(panel.model, panel.trace, name) is None
    assert stage_wave(panel.model, panel.trace, "x0_hat").shape == (1600,)
    panel.stage.value = "mix"
    assert len(soundfile.read(io.BytesIO(panel.sound.value))[0]) == 1600


def test_buttons_and_the_noise(cfg):
    panel = StepDebugger(make_model(cfg), *batch())
    before = panel.trace.z
    for name, steps in (("step-once", 1), ("run-ten", 11), ("back", 0)):
        panel.buttons[name].click()
        assert panel.step_label.value == f"step {steps}"
        assert torch.equal(panel.trace.z, before)
    panel.same_noise.value = False
    panel.step(2)
    assert not torch.equal(panel.trace.z, before)
