"""Float16's gradient scaler, on the CPU: torch has one there, though training does not use it."""

import pytest
import torch

from diffbuf_lib.errors import NonFiniteError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import run as run_module
from tests.training.helpers import Clips, assert_same_state, config, fit, last, same


@pytest.fixture
def scaler(monkeypatch):
    """Let runs have accelerate's fp16 with a scaler of a chosen first scale."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def choose(init_scale):
        def make(training, device):
            AcceleratorState._reset_state(True)
            accelerator = Accelerator(cpu=True, mixed_precision="fp16")
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
            return accelerator

        monkeypatch.setattr(run_module, "make_accelerator", make)

    return choose


@pytest.mark.law
def test_overflow_skips_a_step_and_lowers_the_scale(tmp_path, scaler):
    scaler(2.0**40)
    model = DiffusionBufferModel(config())
    before = [p.detach().clone() for p in model.parameters()]
    records = fit(config("training.num_epochs=12"), tmp_path, steps=2, model=model)
    assert [r.skipped for r in records] == [True, True]
    assert same(list(model.parameters()), before)
    state = last(tmp_path)
    assert state["scaler"]["scale"] == 2.0**38
    assert state["ema"]["n_averaged"] == 0
    records = fit(config("training.num_epochs=12"), tmp_path, resume=True, model=model)
    assert not records[-1].skipped
    assert not same(list(model.parameters()), before)
    assert 0 < records[-1].grad_norm < 1e3  # of the gradient, not of the scaled one


@pytest.mark.law
def test_resume_keeps_the_scale(tmp_path, scaler):
    scaler(2.0**40)
    cfg = config("training.num_epochs=12")
    fit(cfg, tmp_path / "a")
    fit(cfg, tmp_path / "b", steps=5)
    scaler(2.0**10)
    fit(cfg, tmp_path / "b", resume=True)
    assert_same_state(tmp_path / "a", tmp_path / "b")
    assert same(last(tmp_path / "a")["scaler"], last(tmp_path / "b")["scaler"])


def test_endless_overflow_and_a_nan_loss_are_errors(tmp_path, scaler):
    class Steep(DiffusionBufferModel):
        def forward(self, *args, **options):
            loss = super().forward(*args, **options)
            return loss + 0 * next(self.parameters()).abs().sum().mul(0).sqrt()

    scaler(4.0)
    with pytest.raises(NonFiniteError, match=r"step 3 .*overflows float16 even at loss scale 0\.5"):
        fit(config(), tmp_path, valid_set=None, model=Steep(config()))
    assert last(tmp_path)["step"] == 0
    clips = Clips(bad=range(7))
    with pytest.raises(NonFiniteError, match=r"loss is nan.*mixed precision fp16, loss scale 4"):
        fit(config(), tmp_path, valid_set=None, train_set=clips, resume=True)
