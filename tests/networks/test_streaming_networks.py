"""Networks that stream: what each sees of past and buffer, and that a step is the whole."""

import pytest
import torch

from diffbuf_lib.networks.bc_ncsnpp import BlockCausalNCSNpp, CumulatedNorm, Past
from diffbuf_lib.networks.block_causal import BlockCausal
from diffbuf_lib.networks.layers import TimeConv
from diffbuf_lib.networks.recurrent import Recurrent
from tests.conftest import awake, make_model, refused, seeded

pytestmark = pytest.mark.law

BLOCK = 4  # frames of `bc_ncsnpp`


def small(kind, *args):
    torch.manual_seed(0)
    return awake(kind(*args), 0.2).eval().double()


def block_causal():
    return small(BlockCausal, 4, (1, 2))


def recurrent():
    return small(Recurrent, 8, (1, 2), 2)


def bc_ncsnpp():
    return small(BlockCausalNCSNpp, 4, (1, 2, 1))


def inputs(frames, buffer, bins=16, batch=1):
    x = torch.randn(batch, 4, bins, frames, dtype=torch.float64, generator=seeded(1))
    return x, torch.linspace(0.1, 0.8, buffer, dtype=torch.float64).expand(batch, -1)


def influence(net, x, t):
    """[frames out, 4, frames in]: whether any value of a frame depends on any of another."""
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, t), x)
    return jacobian.abs().amax(dim=(0, 1, 2, 4, 6)) > 0  # its axes: [B, 2, F, Kb] then [B, 4, F, K]


@pytest.mark.parametrize("buffer", [1, 3, 4, 6])  # of bc_ncsnpp: in a block, a block, across two
@pytest.mark.parametrize("make", [block_causal, recurrent, bc_ncsnpp])
def test_a_step_is_the_window_that_shows_all_of_the_past(make, buffer):
    """With the silence before it that `start` promises; V's buffer is another one at each step."""
    net, steps, bins = make(), 12, 17
    silence = {block_causal: 40, recurrent: 0, bc_ncsnpp: BLOCK - buffer % BLOCK}[make]
    x, t = inputs(steps + buffer, buffer, bins, batch=2)
    x[..., :buffer] = 0
    state = net.start(bins, t)
    with torch.inference_mode():
        for k in range(steps):
            x[:, :2, :, k + 1 :] = torch.randn_like(x[:, :2, :, k + 1 :])
            window = torch.nn.functional.pad(x[..., : k + 1 + buffer], (silence, 0))
            step = net.step(state, x[..., k : k + 1 + buffer])
            torch.testing.assert_close(step, net(window, t), rtol=1e-10, atol=1e-12)
            assert step.abs().max() > 1e-3


@pytest.mark.parametrize("buffer", [2, 12])
def test_block_causals_buffer_sees_all_of_itself_and_the_past_in_reach(buffer):
    net = block_causal()
    x, t = inputs(net.receptive_field + buffer + 2, buffer)
    seen = influence(net, x, t).any(dim=1)
    assert seen[:, -buffer:].all()
    assert seen[0, 2:].all()
    assert not seen[:, :2].any()  # beyond the receptive field


def test_no_history_feature_of_block_causal_depends_on_a_later_frame_or_on_the_buffer():
    """By Jacobian, for the input of every convolution over time."""
    net, captured = block_causal(), []
    x, t = inputs(12, 4)
    convs = [m for m in net.modules() if isinstance(m, TimeConv)]
    for conv in convs:
        conv.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    later = torch.triu(torch.ones(8, 12, dtype=torch.bool), diagonal=1)

    def features(x):
        captured.clear()
        net(x, t)
        return tuple(h[:, :8].square().sum(dim=(0, 2, 3)) for h in captured)  # 8 frames each

    jacobians = torch.autograd.functional.jacobian(features, x)
    assert len(jacobians) == len(convs)
    for jacobian in jacobians:
        seen = jacobian.abs().amax(dim=(1, 2, 3)) > 0  # [8 history frames, 12 frames]
        assert not (seen & later).any()
        assert seen.diagonal().all()


def test_times_of_the_buffer_matter_once_it_is_trained():
    assert not BlockCausal(4, (1, 2))(torch.randn(1, 4, 32, 9), torch.rand(1, 3)).any()
    net, (x, t) = block_causal(), inputs(24, 5)
    assert (net(x, t) - net(x, t / 2)).abs().max() > 1e-3


def test_a_frame_of_bc_ncsnpp_sees_its_block_and_those_before_and_no_later_one():
    frames = 3 * BLOCK
    seen = influence(bc_ncsnpp(), *inputs(frames, frames, bins=8)).any(dim=1)
    block = torch.arange(frames) // BLOCK
    assert torch.equal(seen, block[:, None] >= block)


def test_the_norm_is_that_of_all_frames_so_far_and_stays_exact_far_from_zero():
    norm, x = CumulatedNorm(8), 1000 + torch.randn(1, 8, 4, 6000)
    out = norm(x, None)
    exact = x.double()
    for k in (0, 1, 5999):
        seen = exact[..., : k + 1].unflatten(1, (norm.groups, -1))
        mean = seen.mean(dim=(2, 3, 4), keepdim=True)
        std = seen.var(dim=(2, 3, 4), correction=0, keepdim=True).sqrt()
        want = ((seen - mean) / std).flatten(1, 2)[..., -1]
        torch.testing.assert_close(out[..., k].double(), want, rtol=0, atol=2e-3)
    past = Past(1)
    parts = [norm(part, past) for part in x.split(1500, dim=-1)]
    torch.testing.assert_close(torch.cat(parts, dim=-1), out, rtol=0, atol=1e-5)


def test_a_recurrent_buffer_frame_sees_all_of_y_and_only_the_buffer_of_v():
    seen = influence(recurrent(), *inputs(12, 4))
    assert seen[:, 2:].all()  # Y: every frame of the past, and of the buffer
    assert seen[:, :2, -4:].all()  # V: the buffer
    assert not seen[:, :2, :-4].any()


def test_buffers_side_by_side_are_buffers_by_themselves():
    net, (x, t) = recurrent(), inputs(14, 4, batch=2)
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
