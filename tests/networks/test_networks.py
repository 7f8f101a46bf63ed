"""Shapes, the paper's size, the FIR filter against scipy, and that time and conditioning matter."""

import pytest
import torch
from scipy import signal

from diffbuf_lib.config import load_config
from diffbuf_lib.networks import can_stream, make_network
from diffbuf_lib.networks.bc_ncsnpp import BlockCausalNCSNpp
from diffbuf_lib.networks.block_causal import BlockCausal
from diffbuf_lib.networks.conv import ConvNet
from diffbuf_lib.networks.layers import Resample, num_groups_for
from diffbuf_lib.networks.ncsnpp import NCSNpp
from diffbuf_lib.networks.recurrent import Recurrent
from tests.conftest import awake, refused

pytestmark = pytest.mark.law


def small_ncsnpp(**changes):
    torch.manual_seed(0)
    net = NCSNpp(**{"base_channels": 8, "channel_multipliers": (1, 2, 2), **changes})
    return awake(net, 0.1).eval()


STREAMS = [
    awake(net, 0.2).eval()
    for net in (BlockCausal(4, (1, 2), 2), Recurrent(8, (1, 2), 2), BlockCausalNCSNpp(4, (1, 2, 1)))
]


@pytest.mark.parametrize(
    ("config", "smallest", "largest"),
    [
        ("9_Diffusion_Buffer_BBED", 18_282_746, 18_282_746),  # of the paper
        ("journal_bc_ncsnpp", 24_362_510 - 128, 24_362_510 - 128),  # frequencies: a buffer
        ("block_causal_tiny", 1e4, 1e5),
        ("block_causal_cpu", 1e6, 3e6),
        ("block_causal_base", 10e6, 20e6),
    ],
)
def test_parameter_counts_of_the_configs(config, smallest, largest):
    with torch.device("meta"):
        net = make_network(load_config(f"configs/{config}.yaml").model)
    assert can_stream(net) == ("BBED" not in config)
    assert smallest <= sum(p.numel() for p in net.parameters()) <= largest


def test_bc_ncsnpp_of_several_blocks_a_level_is_refused():
    cfg = load_config("configs/journal_bc_ncsnpp.yaml", ["model.num_res_blocks=2"])
    refused(lambda: make_network(cfg.model), "num_res_blocks")


@pytest.mark.parametrize("net", [small_ncsnpp(), ConvNet(8, 2), *STREAMS])
@pytest.mark.parametrize(("bins", "frames", "buffer"), [(32, 16, 4), (33, 13, 13), (7, 1, 1)])
def test_any_number_of_bins_and_frames(net, bins, frames, buffer):
    out = net(torch.randn(2, 4, bins, frames), torch.rand(2, buffer))
    assert out.shape == (2, 2, bins, buffer)
    assert out.isfinite().all()


@pytest.mark.parametrize("net", [small_ncsnpp(), ConvNet(8, 2)])
def test_times_belong_to_the_last_frames_and_the_history_has_zero(net):
    x, t = torch.randn(1, 4, 16, 8), torch.tensor([[0.2, 0.5, 0.7]])
    out = net(x, t)
    assert out.shape == (1, 2, 16, 3)
    whole = net(x, torch.nn.functional.pad(t, (5, 0)))
    torch.testing.assert_close(out, whole[..., -3:])


@pytest.mark.parametrize("net", [small_ncsnpp(), small_ncsnpp(num_res_blocks=2), *STREAMS])
def test_every_parameter_gets_a_gradient(net):
    net(torch.randn(1, 4, 16, 16), torch.rand(1, 5)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_output_depends_on_both_parts_of_v_and_y_and_on_the_time_of_the_frame():
    net, x, t = small_ncsnpp(), torch.randn(1, 4, 16, 8), torch.full((1, 8), 0.1)
    later = t.clone()
    later[:, -1] = 0.7
    inputs = [(x + torch.eye(4)[channel].view(1, 4, 1, 1), t) for channel in range(4)]
    for changed in (*inputs, (x, later)):
        assert (net(x, t) - net(*changed)).abs().max() > 1e-3


def test_padding_keeps_the_buffer_at_the_end():
    """13 frames are padded on the left: the same 16 frames with a zero past give the same end."""
    net = small_ncsnpp()
    x, t = torch.randn(1, 4, 16, 13), torch.rand(1, 13)
    torch.testing.assert_close(net(x, t), net(torch.nn.functional.pad(x, (3, 0)), t))


@pytest.mark.parametrize("direction", ["down", "up"])
def test_resampling_agrees_with_scipy(direction):
    x = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    rows = x.numpy()
    for axis in (2, 3):
        if direction == "down":
            rows = signal.upfirdn(taps, rows, up=1, down=1, axis=axis)
            rows = rows.take(range(2, rows.shape[axis], 2), axis=axis)
            rows = rows.take(range(x.shape[axis] // 2), axis=axis)
        else:
            rows = signal.upfirdn([2 * tap for tap in taps], rows, up=2, axis=axis)
            rows = rows.take(range(1, 1 + 2 * x.shape[axis]), axis=axis)
    torch.testing.assert_close(Resample(direction)(x), torch.from_numpy(rows))


@pytest.mark.parametrize("channels", [1, 3, 4, 12, 96, 288, 1000])
def test_groups_divide_the_channels(channels):
    assert channels % num_groups_for(channels) == 0
    assert num_groups_for(96) == 24
    assert num_groups_for(288) == 32
