"""The model that comes with the package: found without a network, and it cleans speech."""

import socket
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from diffbuf_lib import DiffusionBufferModel, DNLMDataset, OnlineEnhancer, load_config
from diffbuf_lib.data import read_audio, write_audio
from diffbuf_lib.model import load_model
from diffbuf_lib.pretrained import DEFAULT
from diffbuf_lib.training import load_weights
from diffbuf_lib.training.feed import Stream, seed_everything
from diffbuf_lib.training.folder import apply_weights, read_history
from diffbuf_lib.training.metrics import score_clips
from recipes.cpu_demo import pretraining
from recipes.demo.demo_set import build_demo
from tests.conftest import call, seeded, stream
from tests.training.helpers import config, same

ROOT = Path(__file__).parents[1]
TRAINED_BY = ROOT / "configs/demo_model.yaml"


@pytest.fixture(scope="module")
def clips():
    root = build_demo(ROOT / "data" / "DN-LM-demo")
    data = DNLMDataset(root / "test", 6 * 16000, training=False)
    mix, target = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.cat(mix), torch.cat(target)


def test_it_is_found_without_a_network_and_is_what_the_config_trains(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)  # whoever asks for an address fails
    model, cfg = DiffusionBufferModel.from_pretrained(DEFAULT), load_config(TRAINED_BY)
    assert same(load_model(DEFAULT, "cpu").state_dict(), model.state_dict())
    assert model.cfg == cfg
    # Whose first stage differs in training, not in what has weights.
    first = pretraining.first_stage(cfg)
    assert first.model == cfg.model
    assert (first.training.from_noisy, first.training.own_estimate) == (True, 0)


def test_online_it_cleans_speech_under_drones(clips):
    """Speakers and drones of the demo's test clips; the stream, not the training loss."""
    mix, target = clips
    estimate = stream(OnlineEnhancer(load_model(DEFAULT, "cpu"), batch=len(mix)), mix)
    before, after = (score_clips(x, target, 16000, ("si_sdr", "estoi")) for x in (mix, estimate))
    assert ((after["si_sdr"] - before["si_sdr"]) > 3).all()
    gained = after["estoi"] - before["estoi"]
    assert (gained > 0).all()
    assert gained.mean() > 0.05


def test_enhance_takes_it_where_no_model_is_named(tmp_path, monkeypatch, capsys):
    noisy, made = tmp_path / "noisy.wav", tmp_path / "clean.wav"
    write_audio(noisy, 0.1 * torch.randn(1, 8000, generator=seeded()), 16000)
    assert call(monkeypatch, capsys, "enhance", noisy, "-o", made)[0] == 0
    clean, rate = read_audio(made)
    assert (rate, clean.shape) == (16000, (1, 8000))
    assert clean.any()


def test_the_second_stage_starts_from_the_first_and_both_go_on(tmp_path, monkeypatch):
    """On a small set in the place of Debian's voices."""
    for name in ("train/speech/a", "train/speech/b", "train/noise/c", "valid/speech/d"):
        path = tmp_path / "data" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, 0.1 * torch.randn(1, 48000, generator=seeded(len(name))), 16000)
    monkeypatch.setattr(pretraining, "build_pretraining", lambda *_args, **_options: None)
    changed = ("training.own_estimate=0", "training.num_steps=3", "training.lr=1e-2")
    monkeypatch.setattr(pretraining, "first_stage", lambda cfg: cfg.override(*changed))
    cfg = config(
        "training.loss=data_prediction", "training.own_estimate=1", "training.num_steps=2",
        "training.num_epochs=9", "training.batch_size=1", "training.lr=1e-30",
        "training.ema_momentum=0",
    )  # fmt: skip
    stages = [tmp_path / "run" / stage for stage in ("first", "second")]
    for _ in range(2):  # the second time there is nothing left to do
        folder = pretraining.run_pretraining(cfg, tmp_path / "data", tmp_path / "run")
        assert folder == stages[1] / "model"
        histories = [read_history(stage / "history.jsonl") for stage in stages]
        assert [sum("loss" in line for line in history) for history in histories] == [3, 2]
    first, second = (load_weights(stage / "checkpoints" / "last.pt") for stage in stages)
    with torch.random.fork_rng():
        seed_everything(cfg.training.seed, Stream.WEIGHTS)
        fresh = DiffusionBufferModel(cfg).state_dict()
    assert any((first[name] - fresh[name]).abs().max() > 1e-3 for name in fresh)
    assert_close(second, first)  # at the second stage's rate nothing moves


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--device", "cuda"], "cuda"),
        (["--device", "gpu"], "gpu"),
        (["--device", "mps"], "mps"),
        (["--model", "diffbuf/cpu-dmo"], "diffbuf/cpu-demo"),  # asks no network
    ],
)
def test_a_device_or_model_that_is_not_there_is_told_in_one_line(
    monkeypatch, capsys, tmp_path, flags, part
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = call(monkeypatch, capsys, "enhance", "x.wav", "-o", tmp_path, *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert part in err


def test_fine_tuning_starts_from_the_bundled_weights_by_name():
    tuned = DiffusionBufferModel(load_config(ROOT / "configs/finetune.yaml"))
    apply_weights(tuned, load_weights(DEFAULT), DEFAULT)
    bundled = DiffusionBufferModel.from_pretrained(DEFAULT)
    for section in ("audio", "preprocessing", "model", "diffusion_buffer", "sde"):
        assert getattr(tuned.cfg, section) == getattr(bundled.cfg, section)
    assert same(tuned.state_dict(), bundled.state_dict())
