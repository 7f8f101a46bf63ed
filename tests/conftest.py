from itertools import pairwise
from typing import TypeVar

import pytest
import torch

from diffbuf_lib import Config, DiffusionBufferModel, cli
from diffbuf_lib.config import build_config
from diffbuf_lib.errors import DiffbufError

# Two xdist workers on two cores: more threads each would only wait for one another.
torch.set_num_threads(1)

Net = TypeVar("Net", bound=torch.nn.Module)
TINY = {
    "audio": {"chunk_size": 1600, "stft": {"n_fft": 62, "win_length": 62, "hop_length": 32}},
    "model": {"name": "conv", "base_channels": 4, "num_layers": 1},
    "diffusion_buffer": {"buffer_size": 4, "num_frames": 10},
    "training": {"use_amp": False, "num_workers": 0, "batch_size": 2, "loss": "weighted_score"},
}


@pytest.fixture
def tiny_cfg() -> Config:
    """A config whose model runs in milliseconds: 51 frames of 32 bins, B = 4, K = 10."""
    return build_config(TINY)


def make_model(cfg: Config, seed: int = 0) -> DiffusionBufferModel:
    torch.manual_seed(seed)
    return awake(DiffusionBufferModel(cfg), 0.05)


def awake(net: Net, std: float) -> Net:
    """A network whose last layers, zero at the start, are not: its output says something."""
    for parameter in net.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return net


@pytest.fixture
def perfect_model(tiny_cfg, monkeypatch):
    """A model that gives its input back: what then differs is what is done around it."""
    model = make_model(tiny_cfg.override("training.loss=data_prediction"))
    monkeypatch.setattr(model, "denoise", lambda V, Y, t: (Y[..., -4:], Y[..., -4:]))
    return model


def stream(enhancer, signal, cuts=()):
    """What comes out of a stream for a signal [..., T] that is pushed in pieces."""
    edges = pairwise([0, *sorted(cuts), signal.shape[-1]])
    pieces = [enhancer.push(signal[..., start:end]) for start, end in edges]
    return torch.cat([*pieces, enhancer.flush()], dim=-1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def refused(make, *parts):
    """Check that our error is one line and names all of `parts`."""
    with pytest.raises(DiffbufError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def call(monkeypatch, capsys, *args):
    """Run `diffbuf ...` in this process; returns (exit status, stdout, stderr)."""
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)
    monkeypatch.setattr(cli.faulthandler, "enable", lambda: None)  # pytest has its own
    status = 0
    try:
        cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
