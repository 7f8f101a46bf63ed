"""The recurrent network: laws of what it sees and remembers."""

import pytest
import torch
from torch import nn

from diffbuf_lib.networks.recurrent import Recurrent
from tests.conftest import make_model, refused, seeded

pytestmark = pytest.mark.law


def small_net(blocks: int = 2) -> Recurrent:
    torch.manual_seed(0)
    net = Recurrent(8, (1, 2), blocks).double().eval()
    for parameter in net.parameters():  # zero-initialised layers would hide what follows them
        nn.init.normal_(parameter, std=0.2)
    return net


def inputs(frames: int, buffer: int, bins: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 4, bins, frames, dtype=torch.float64, generator=seeded(1))
    return x, torch.linspace(0.1, 0.9, buffer, dtype=torch.float64).expand(2, -1)


def test_a_buffer_frame_sees_all_of_y_and_only_the_buffer_of_v():
    net, (x, t) = small_net(), inputs(12, 4)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, t)[0].abs().sum((0, 1)), x)
    seen = jacobian[:, 0].abs().sum(dim=2) > 1e-12  # [Kb, 4, K]
    assert seen[:, 2:].all()  # Y: every frame of the past, and of the buffer
    assert seen[:, :2, -4:].all()  # V: the buffer
    assert not seen[:, :2, :-4].any()


def test_the_trunk_sees_no_later_frame():
    net, (x, _) = small_net(), inputs(9, 1, bins=16)
    y = x[:1].permute(0, 3, 2, 1)[..., 2:]
    jacobian = torch.autograd.functional.jacobian(lambda y: net.trunk(y, {}).sum((0, 2, 3)), y)
    seen = jacobian[:, 0].abs().sum(dim=(2, 3)) > 1e-12
    assert torch.equal(seen, torch.ones(9, 9, dtype=torch.bool).tril())


def test_frames_of_one_call_are_those_of_many():
    net, (x, t) = small_net(), inputs(11, 3)
    state = net.start(17, t)
    x[..., :3] = 0  # the silence that a stream begins with
    for k in range(3, 11):
        out = net.step(state, x[..., k - 3 : k + 1])
        assert torch.allclose(out, net(x[..., : k + 1], t), rtol=0, atol=1e-12)


def test_buffers_side_by_side_are_buffers_by_themselves():
    net, (x, t) = small_net(), inputs(14, 4)
    both = net(x, torch.cat([t, t.flip(1)], dim=1), buffers=2)
    assert torch.allclose(both[..., 4:], net(x, t.flip(1)), rtol=0, atol=1e-12)
    assert torch.allclose(both[..., :4], net(x[..., :-4], t), rtol=0, atol=1e-12)


MANY = ("model.name=recurrent", "model.base_channels=8", "model.channel_multipliers=[1,2]",
        "diffusion_buffer.buffers=3", "training.loss=data_prediction")  # fmt: skip


def test_many_buffers_of_a_clip_are_one_trace(tiny_cfg):
    cfg = tiny_cfg.override(*MANY, "training.own_estimate=0.5")
    n, Kb = 3 * cfg.diffusion_buffer.buffer_size, cfg.diffusion_buffer.buffer_size
    model, wave = make_model(cfg), torch.randn(2, 1, cfg.audio.chunk_size)
    trace = model.trace(wave, 0.5 * wave, seeded(1))
    assert trace.t.shape == (2, n)
    assert (trace.t.unflatten(1, (3, Kb)).diff(dim=2) >= 0).all()
    assert torch.equal(trace.V[..., :-n], trace.S[..., :-n])
    assert trace.x0_hat.shape[-1] == n
    assert torch.equal(model.trace(wave, 0.5 * wave, draws=trace.draws).V, trace.V)


@pytest.mark.parametrize(
    ("override", "key"),
    [("diffusion_buffer.buffers=300", "audio.chunk_size"), ("model.name=conv", "model.name")],
)
def test_too_many_buffers_are_refused_by_key(tiny_cfg, override, key):
    refused(lambda: tiny_cfg.override(*MANY, override), key)
