"""The memory format of a run: measured where it begins, kept where it goes on."""

import pytest
import torch

from diffbuf_lib import DiffusionBufferModel
from diffbuf_lib.training import load_checkpoint, run, save_checkpoint, train
from diffbuf_lib.training.folder import ResultsFolder
from diffbuf_lib.training.step import fastest_format, make_accelerator
from tests.conftest import refused, seeded
from tests.training.helpers import Clips, config, fit


def _train(cfg, folder, resume=False):
    model = DiffusionBufferModel(cfg)
    list(train(cfg, Clips(2), None, folder, resume=resume, model=model))
    return model, load_checkpoint(ResultsFolder(folder).last)


@pytest.mark.law
def test_a_run_keeps_the_format_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fastest_format", lambda *_: ("contiguous", "measured"))
    model, state = _train(config("training.num_epochs=1"), tmp_path)
    assert model.memory_format == "contiguous"
    monkeypatch.setattr(run, "fastest_format", lambda *_: pytest.fail("measured again"))
    model, later = _train(config("training.num_epochs=2"), tmp_path, resume=True)
    assert model.memory_format == "contiguous"
    assert state["memory_format"] == later["memory_format"] == "contiguous"


@pytest.mark.law
def test_formats_give_the_same_loss():
    wave = 0.1 * torch.randn(2, 1, 4000, generator=seeded(0))
    model = DiffusionBufferModel(config())
    losses = []
    for name in ("channels_last", "contiguous"):
        model.set_memory_format(name)
        losses.append(model(wave, wave, generator=seeded(1)))
    torch.testing.assert_close(*losses)
    refused(lambda: model.set_memory_format("channels"), "use channels_last or contiguous")
    assert model.memory_format == "contiguous"


def test_what_is_measured(tmp_path):
    wide = config("model.base_channels=64")
    accelerator = make_accelerator(wide.training, "cpu")
    name, why = fastest_format(wide, accelerator)
    assert name in ("channels_last", "contiguous")
    assert "ms" in why
    assert fastest_format(config(), accelerator) == ("channels_last", "")  # too narrow to matter
    chosen = wide.override("training.memory_format=contiguous")
    assert fastest_format(chosen, accelerator) == ("contiguous", "")


@pytest.mark.law
def test_to_measure_changes_no_first_weight(tmp_path):
    """And a run of before there was a choice goes on."""
    wide = ("model.base_channels=64", "training.num_steps=1")
    losses = {
        name: fit(config(*wide, f"training.memory_format={name}"), tmp_path / name)[0].loss
        for name in ("auto", "channels_last")
    }
    assert losses["auto"] == pytest.approx(losses["channels_last"], rel=1e-4)
    state = load_checkpoint(ResultsFolder(tmp_path / "auto").last)
    del state["memory_format"], state["config"]["training"]["memory_format"]
    del state["format"]
    save_checkpoint(ResultsFolder(tmp_path / "auto").last, state)
    more = fit(config(*wide[:1], "training.num_steps=2"), tmp_path / "auto", resume=True)
    assert [record.step for record in more] == [2]
