"""History sees no future, the buffer sees all of itself, and the cache changes no number."""

import pytest
import torch

from diffbuf_lib.networks.block_causal import BlockCausal
from diffbuf_lib.networks.layers import TimeConv
from tests.conftest import awake, learn

pytestmark = pytest.mark.law

F_, K, KB = 32, 24, 5


def small_net(dtype=torch.float64, **changes) -> BlockCausal:
    torch.manual_seed(0)
    net = BlockCausal(**{"base_channels": 4, "channel_multipliers": (1, 2), **changes})
    return awake(net, 0.2).eval().to(dtype)


def test_no_history_feature_depends_on_a_later_frame_or_on_the_buffer():
    """By Jacobian, for the input of every convolution over time."""
    net, captured = small_net(), []
    x = torch.randn(1, 4, 16, 12, dtype=torch.float64)
    t = torch.linspace(0.1, 0.8, 4, dtype=torch.float64)[None]
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


@pytest.mark.parametrize("buffer", [2, 12])
def test_every_buffer_frame_sees_the_whole_buffer_and_the_past_in_reach(buffer):
    net = small_net()
    frames = net.receptive_field + buffer + 2
    t = torch.linspace(0.1, 0.8, buffer, dtype=torch.float64)[None]
    x = torch.randn(1, 4, 16, frames, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, t), x)
    seen = jacobian.abs().amax(dim=(0, 1, 2, 4, 5, 6)) > 0  # [frames out, frames in]
    assert seen[:, -buffer:].all()
    assert seen[0, 2:].all()
    assert not seen[:, :2].any()  # beyond the receptive field


def test_times_of_the_buffer_matter_once_it_is_trained():
    assert not BlockCausal(4, (1, 2))(torch.randn(1, 4, 32, 9), torch.rand(1, 3)).any()
    net, x = small_net(), torch.randn(1, 4, F_, K, dtype=torch.float64)
    t = torch.linspace(0.1, 0.8, KB, dtype=torch.float64)[None]
    assert (net(x, t) - net(x, t / 2)).abs().max() > 1e-3


@pytest.mark.parametrize("window", ["just the receptive field", "the whole past"])
def test_a_step_is_the_window_that_shows_all_of_the_past(window):
    net = small_net(channel_multipliers=(1, 2, 2), num_res_blocks=2)
    reach, frames = net.receptive_field, 12
    t = torch.linspace(0.1, 0.8, KB, dtype=torch.float64).expand(3, -1)
    x = torch.randn(3, 4, 33, frames + KB, dtype=torch.float64)
    whole = torch.nn.functional.pad(x, (reach, 0))
    cache = net.start(33, t)
    with torch.inference_mode():
        for k in range(frames):
            start = 0 if window == "the whole past" else k + 1
            expected = net(whole[..., start : reach + k + 1 + KB], t)
            out = net.step(cache, x[..., k : k + 1 + KB])
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
            short = net(whole[..., k + 1 + reach // 2 : reach + k + 1 + KB], t)  # half of it
            assert not torch.allclose(out, short, rtol=1e-10, atol=1e-12)


def test_one_clip_overfits():
    """A network of 5,000 weights learns a map that needs the history, the buffer and the time."""
    net = small_net(torch.float32, base_channels=8)
    x, t = torch.randn(1, 4, F_, K), torch.linspace(0.1, 0.8, KB)[None]
    target = torch.randn(1, 2, F_, KB)
    assert learn(net, lambda: (net(x, t) - target).square().mean(), 150, lr=1e-2) < 0.1
