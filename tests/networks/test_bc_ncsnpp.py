"""The journal's network sees whole blocks and no later one; a stream equals the whole."""

import pytest
import torch

from diffbuf_lib.config import load_config
from diffbuf_lib.graph import tensors
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.networks import make_network
from diffbuf_lib.networks.bc_ncsnpp import BlockCausalNCSNpp, CumulatedNorm, Past
from tests.conftest import learn, refused

BLOCK = 4  # of `small_net`


def small_net() -> BlockCausalNCSNpp:
    torch.manual_seed(0)
    return BlockCausalNCSNpp(4, (1, 2, 1)).eval().double()


def test_a_frame_sees_its_block_and_those_before_and_no_later_one():
    """By Jacobian, of all frames of three blocks."""
    net, frames = small_net(), 3 * BLOCK
    t = torch.linspace(0.1, 0.8, frames, dtype=torch.float64)[None]
    x = torch.randn(1, 4, 8, frames, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, t), x)
    seen = jacobian.abs().amax(dim=(0, 1, 2, 4, 5, 6)) > 0  # [frames out, frames in]
    block = torch.arange(frames) // BLOCK
    assert torch.equal(seen, block[:, None] >= block)


@pytest.mark.parametrize("buffer", [1, 3, 4, 6])  # within a block, one block, across two
def test_a_stream_equals_the_whole(buffer):
    """Step n is the window of n frames and the silence that `start` promises."""
    net, steps, bins = small_net(), 2 * BLOCK + 3, 9
    t = torch.linspace(0.1, 0.8, buffer, dtype=torch.float64)[None].expand(2, -1)
    history = torch.randn(2, 4, bins, steps, dtype=torch.float64)
    state = net.start(bins, t)
    size = len(tensors(state))
    silence = torch.zeros(2, 4, bins, BLOCK - buffer % BLOCK, dtype=torch.float64)
    for n in range(1, steps + 1):
        now = torch.randn(2, 4, bins, buffer, dtype=torch.float64)
        got = net.step(state, torch.cat([history[..., n - 1 : n], now], dim=-1))
        whole = torch.cat([silence, history[..., :n], now], dim=-1)
        torch.testing.assert_close(got, net(whole, t))
    assert len(tensors(state)) > size


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


def test_its_config_and_a_model_that_learns():
    cfg = load_config("configs/journal_bc_ncsnpp.yaml")
    refused(lambda: make_network(cfg.override("model.num_res_blocks=2").model), "num_res_blocks")
    small = cfg.override(
        "model.base_channels=8", "model.channel_multipliers=[1, 1, 1]", "audio.chunk_size=4000",
        "audio.stft={n_fft: 62, win_length: 62, hop_length: 62}",
        "diffusion_buffer.buffer_size=4", "diffusion_buffer.num_frames=16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = DiffusionBufferModel(small)
    target = 0.3 * torch.sin(torch.arange(4000) / 6.0).expand(2, 1, -1)
    mix = target + 0.1 * torch.randn(2, 1, 4000)
    learn(model, lambda: model(mix, target), 40, lr=3e-3)
    trace = model.trace(mix, target)
    clean = trace.S[..., -4:]
    error, noise = ((of[..., -4:].detach() - clean).abs() for of in (trace.x0_hat, trace.Y))
    assert error.square().mean() < 0.2 * min(noise.square().mean(), clean.abs().square().mean())
    assert model.enhance(mix, delay=1).isfinite().all()
