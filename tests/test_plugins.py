"""A network, an SDE, a loss, an optimizer and a metric from outside the package, used throughout.

No file of the library knows them: what a stranger writes must train, stream, fail, replay and be
scored as what comes with it.
"""

import math

import pytest
import torch
from pydantic import Field
from torch import nn

from diffbuf_lib import DiffusionBufferModel, OnlineEnhancer, load_config
from diffbuf_lib.config import Section, build_config
from diffbuf_lib.diagnostics import examine, has_error
from diffbuf_lib.diagnostics.capsule import Capsule
from diffbuf_lib.diffusion.sde import over_frequency
from diffbuf_lib.errors import NonFiniteError
from diffbuf_lib.registry import LOSSES, METRICS, NETWORKS, OPTIMIZERS, SDES
from diffbuf_lib.training import train
from tests.conftest import TINY, refused, seeded, stream
from tests.training.helpers import Clips

pytestmark = pytest.mark.law


class ToyOptions(Section):
    width: int = Field(3, ge=1, description="hidden channels")


class RateOptions(Section):
    rate: float = Field(1.0, gt=0, description="sigma is rate t")


class ToyNet(nn.Module):
    """Each frame sees itself and the frame before: enough to need a memory in a stream."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg.options.width
        self.first = nn.Conv2d(8, width, 1)
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x, t):
        return self._run(nn.functional.pad(x, (1, 0)), t.shape[-1])

    def start(self, num_bins, t, *, compiled=False, precision="fp32"):
        self.buffer = t.shape[-1]
        return {"frame": self.first.weight.new_zeros(len(t), 4, num_bins, 1)}

    def step(self, state, x):
        out = self._run(torch.cat([state["frame"], x], dim=-1), self.buffer)
        state["frame"] = x[..., :1].clone()
        return out

    def _run(self, x, buffer):
        h = torch.cat([x[..., 1:], x[..., :-1]], dim=1)
        return self.last(torch.tanh(self.first(h)))[..., -buffer:]


class ToySDE:
    """Mean as in BBED, sigma = rate t."""

    def __init__(self, rate):
        self.rate = rate

    def mean(self, x0, y, t):
        return x0 + over_frequency(t, x0) * (y - x0)

    def std(self, t):
        return self.rate * t

    def drift(self, x, y, t):
        return y - x

    def diffusion(self, t):
        return torch.full_like(t, self.rate)

    def denoised(self, xt, y, t):
        t = over_frequency(t, xt)
        return (xt - t * y) / (1 - t)


def toy_loss(given):
    """Of the waveform: the mean absolute error of the buffer's samples."""
    samples = (given.S.shape[-1] - 1) * given.spectral.hop_length
    wave, clean = (given.spectral.inverse(spec, samples) for spec in (given.x0_hat, given.S))
    return (wave - clean).abs()


def toy_metric(estimate, target, sample_rate):
    return -20 * math.log10(float((estimate - target).abs().mean()) + 1e-9)


TOYS = (
    (NETWORKS, "toy_net", ToyNet, ToyOptions, {}),
    (SDES, "toy_sde", ToySDE, RateOptions, {"t_limit": 1.0}),
    (LOSSES, "toy_loss", toy_loss, None, {"predicts": "data"}),
    (OPTIMIZERS, "toy_optimizer", torch.optim.Adagrad, None, {"states": 1}),
    (METRICS, "toy_metric", toy_metric, None, {"unit": "dB"}),
)


@pytest.fixture
def cfg():
    for choices, name, target, options, facts in TOYS:
        choices.register(name, options=options, **facts)(target)
    overrides = [
        "model={name: toy_net, options: {width: 5}}", "sde={type: toy_sde, diffusion: {rate: 0.3}}",
        "training.loss=toy_loss", "training.optimizer=toy_optimizer",
        "training.metrics=[toy_metric]", "training.metric_for_scheduler=toy_metric",
        "training.num_steps=2", "audio.chunk_size=4000",
    ]  # fmt: skip
    yield build_config(TINY, overrides)
    for choices, name, *_ in TOYS:
        del choices[name]


def test_they_train_under_the_doctor_and_stream_as_a_whole(cfg, tmp_path):
    clips = Clips(8, length=1600)
    assert not has_error(examine(cfg, clips, clips, results_path=tmp_path))
    records = list(train(cfg, clips, clips, tmp_path / "run", device="cpu"))
    assert len(records) == 2
    assert math.isfinite(records[-1].valid["toy_metric"])
    model = DiffusionBufferModel.from_pretrained(tmp_path / "run" / "model").eval().double()
    assert model.cfg.model.options.width == model.network.first.out_channels == 5
    signal = 0.1 * torch.randn(900, generator=seeded(), dtype=torch.float64)
    enhancer = OnlineEnhancer(model, seed=1, delay=2)
    assert enhancer.state.buffer.memory is not None
    streamed = stream(enhancer, signal, [77])
    whole = model.enhance(signal[None, None], seeded(1), delay=2)[0, 0]
    torch.testing.assert_close(streamed, whole, rtol=1e-6, atol=1e-9)


def test_a_step_that_fails_is_replayed(cfg, tmp_path):
    cfg, clips = cfg.override("training.num_steps=4"), Clips(8, bad=[3], length=1600)
    with pytest.raises(NonFiniteError, match="clip_003"):
        list(train(cfg, clips, None, tmp_path, device="cpu"))
    (folder,) = tmp_path.glob("capsule_*")
    result = Capsule.load(folder).replay()
    assert result.reproduced
    assert "clip_003" in str(result.finding)


def test_a_plugin_is_imported_by_the_config_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "my_plugin.py").write_text(
        "from diffbuf_lib.registry import LOSSES\n"
        "@LOSSES.register('mine', predicts='score')\n"
        "def mine(given):\n    return given.score.abs()\n"
    )
    (tmp_path / "c.yaml").write_text("plugins: [my_plugin]\ntraining: {loss: mine}\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load_config(tmp_path / "c.yaml").training.loss == "mine"
    finally:
        del LOSSES["mine"]
    missing = "plugins=[no_such_plugin]"
    refused(lambda: load_config(tmp_path / "c.yaml", [missing]), "no_such_plugin")
    # A config of a checkpoint imports nothing.
    refused(lambda: build_config({"plugins": ["my_plugin"], "training": {"loss": "mine"}}), "mine")
