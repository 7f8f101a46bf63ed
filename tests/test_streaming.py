"""A stream is the whole signal, however it is cut, and knows no future."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffbuf_lib import DiffusionBufferModel, OnlineEnhancer, load_config
from diffbuf_lib.config import build_config
from tests.conftest import TINY, make_model, refused, seeded, stream

pytestmark = pytest.mark.law

# History features reach 12 frames back: the window of K = 16 shows all that a buffer of 4 can see.
BLOCK_CAUSAL = (
    "model.name=block_causal",
    "model.channel_multipliers=[1, 2]",
    "diffusion_buffer.num_frames=16",
)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 900),
    cuts=st.lists(st.integers(0, 900), max_size=6),
    loss=st.sampled_from([("weighted_score", 4), *(("data_prediction", d) for d in (1, 2, 4))]),
    n_fft=st.sampled_from([62, 63, 64]),
    hop=st.sampled_from([32, 13]),
    network=st.sampled_from([(), BLOCK_CAUSAL]),
    level=st.sampled_from(["null", "0.05"]),
)
def test_any_cut_gives_the_whole(length, cuts, loss, n_fft, hop, network, level):
    loss, delay = loss
    stft = (f"audio.stft.n_fft={n_fft}", f"audio.stft.hop_length={hop}")
    options = [f"training.loss={loss}", f"preprocessing.level_seconds={level}", *stft, *network]
    # In float64: compression takes a rounding error of 1e-16 in an empty bin to 1e-8.
    model = make_model(build_config(TINY, options)).double()
    signal = torch.randn(length, generator=seeded(length), dtype=torch.float64) * 0.1
    signal *= torch.linspace(0.01, 1, length, dtype=torch.float64) ** 2  # the level rises
    whole = model.enhance(signal[None, None], seeded(7), delay=delay)[0, 0]
    enhancer = OnlineEnhancer(model, seed=7, delay=delay)
    streamed = stream(enhancer, signal, [min(cut, length) for cut in cuts])
    assert streamed.shape == signal.shape
    scale = whole.abs().max()
    assert (streamed - whole).abs().max() <= 1e-6 * scale


def test_float32_at_the_papers_stft(tiny_cfg):
    model = make_model(tiny_cfg.override("audio.stft={}", "audio.chunk_size=16000"))
    signal = torch.randn(9000) * 0.1
    whole = model.enhance(signal[None, None], seeded(2))[0, 0]
    streamed = stream(OnlineEnhancer(model, seed=2), signal, [1, 700, 701, 5000])
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("delay", [1, 3, 4])
@pytest.mark.parametrize(
    ("n_fft", "hop", "first"),
    [(62, 32, 31), (64, 32, 32 + 32), (64, 16, 32 + 32), (63, 10, 32 + 30)],
)  # the first sample waits for `first` samples: for half a window, and the frames that cover it too
def test_samples_wait_for_latency_and_none_longer_than_the_worst(
    tiny_cfg, n_fft, hop, first, delay
):
    stft = f"audio.stft={{n_fft: {n_fft}, win_length: {n_fft}, hop_length: {hop}}}"
    model = make_model(tiny_cfg.override(stft, "training.loss=data_prediction"))
    enhancer, waits = OnlineEnhancer(model, delay=delay), []
    for pushed in range(1, 600):
        waits += [pushed - len(waits) - i for i in range(enhancer.push(torch.randn(1)).numel())]
    assert waits[0] == enhancer.latency_samples == first + (delay - 1) * hop
    assert max(waits) == enhancer.worst_latency_samples == n_fft + (delay - 1) * hop


@pytest.mark.parametrize("network", [(), BLOCK_CAUSAL])
def test_reset_flush_and_neighbours_leave_no_trace(tiny_cfg, network):
    model = make_model(tiny_cfg.override(*network))
    signal, other = torch.randn(2, 500)
    fresh = stream(OnlineEnhancer(model), signal)
    a, b = OnlineEnhancer(model), OnlineEnhancer(model, seed=1)
    a.push(other)
    a.reset()
    first = [a.push(signal[:250]), b.push(other), a.push(signal[250:]), a.flush()]
    assert torch.equal(torch.cat([first[0], first[2], first[3]]), fresh)
    assert torch.equal(stream(a, signal), fresh)  # after flush
    assert OnlineEnhancer(model).flush().shape == (0,)
    side_by_side = stream(OnlineEnhancer(model, batch=3), torch.randn(3, 400), [100, 101])
    assert side_by_side.shape == (3, 400)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x.double(), torch.float64),
        (lambda x: x[None], torch.float32),
        (lambda x: (x * 2**15).short(), torch.int16),
        (lambda x: x.numpy(), np.float32),
        (lambda x: x[None].double().numpy(), np.float64),
        (lambda x: (x.double() * 2**31).int().numpy(), np.int32),
    ],
)
def test_push_takes_what_people_have_and_gives_its_kind_back(tiny_cfg, make, kind):
    cfg = tiny_cfg.override("training.loss=data_prediction", "model.x0_output=mask")
    model, signal = make_model(cfg), 0.1 * torch.randn(700, generator=seeded())
    plain = stream(OnlineEnhancer(model), signal)
    enhancer, given = OnlineEnhancer(model), make(signal)
    pieces = [enhancer.push(given[..., :300]), enhancer.push(given[..., 300:]), enhancer.flush()]
    assert all(type(p) is type(given) and p.dtype == kind and p.ndim == given.ndim for p in pieces)
    out = torch.cat([torch.as_tensor(p) for p in pieces], dim=-1).double()
    assert out.shape == given.shape
    scale = {torch.int16: 2**15, np.int32: 2**31}.get(kind, 1)
    torch.testing.assert_close(out.flatten() / scale, plain.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "samples", [[0.1, 0.2], torch.ones(3, dtype=torch.bool), np.float32(1), torch.zeros(1, 1, 4)]
)
def test_push_refuses_anything_else_in_one_line(tiny_cfg, samples):
    model = make_model(tiny_cfg)
    refused(lambda: OnlineEnhancer(model).push(samples), "push takes")
    refused(lambda: OnlineEnhancer(model, batch=3).push(torch.zeros(2, 400)), "[3, T]")


@pytest.mark.parametrize("network", [(), BLOCK_CAUSAL])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_counts_as_zero_and_is_counted(tiny_cfg, network, bad):
    model = make_model(tiny_cfg.override(*network))
    signal = 0.1 * torch.randn(1500, generator=seeded())
    zeroed = signal.clone()
    zeroed[200:203] = 0
    signal[200:203] = bad
    enhancer = OnlineEnhancer(model)
    out = enhancer.push(signal)
    assert enhancer.state.bad == 3
    assert torch.equal(torch.cat([out, enhancer.flush()]), stream(OnlineEnhancer(model), zeroed))


def test_after_an_error_a_stream_begins_anew(tiny_cfg, monkeypatch):
    model, signal = make_model(tiny_cfg), torch.randn(500)
    enhancer = OnlineEnhancer(model)
    with monkeypatch.context() as patched:
        patched.setattr(enhancer.sampler, "denoise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            enhancer.push(signal)
    assert torch.equal(stream(enhancer, signal), stream(OnlineEnhancer(model), signal))


def frames_of(sampler, R, seed=0):
    """What a stream of noisy frames [B, F, K] is turned into, [B, F, K]."""
    generator = seeded(seed)
    state = sampler.start(R.shape[0], R.shape[1], generator, R.dtype)
    with torch.inference_mode():
        return torch.stack([sampler.step(state, r, generator) for r in R.unbind(-1)], dim=-1)


@pytest.mark.parametrize(
    ("override", "dtype", "frames", "tolerance"),
    [
        ("training.loss=data_prediction", torch.float64, 2000, 1e-10),
        ("training.loss=weighted_score", torch.float32, 2000, 1e-5),
        ("training.loss=weighted_score", torch.float64, 200, 1e-10),
        ("training.loss=data_prediction", torch.float32, 200, 1e-5),
        ("model.data_scale=0.05", torch.float64, 40, 1e-10),
        # The window holds every frame so far, and the silence before.
        ("diffusion_buffer.num_frames=60", torch.float64, 40, 1e-10),
    ],
)
def test_cached_is_recomputed(tiny_cfg, override, dtype, frames, tolerance):
    """The cache against all K frames of the window anew, over a long stream."""
    cfg = tiny_cfg.override(*BLOCK_CAUSAL, override)
    model = make_model(cfg).to(dtype).eval()
    assert cfg.num_frames - 4 >= model.network.receptive_field
    R = torch.randn(2, 32, frames, dtype=dtype.to_complex(), generator=seeded(1)) * 0.1
    R[..., 50:60] = 0  # digital silence
    recomputed = frames_of(model.sampler(cached=False), R)
    cached = frames_of(model.sampler(), R)
    assert (cached - recomputed).abs().max() <= tolerance * recomputed.abs().max()
    assert not torch.allclose(recomputed, frames_of(model.sampler(), R.flip(-1)))


def test_no_output_depends_on_a_sample_that_was_not_pushed(tiny_cfg):
    """By Jacobian: an output sample depends on none that was pushed after it came out."""
    model = make_model(tiny_cfg.override(*BLOCK_CAUSAL)).double()
    signal = torch.randn(256, dtype=torch.float64, generator=seeded()) * 0.1
    latency = OnlineEnhancer(model).latency_samples

    def enhanced(samples):
        out = OnlineEnhancer(model)
        out._advance = out._advance.__wrapped__.__get__(out)  # with gradients
        return out.push(samples)

    jacobian = torch.autograd.functional.jacobian(enhanced, signal)
    assert jacobian.abs().sum(dim=1).all()
    for i, row in enumerate(jacobian):
        pushed = latency + -(-i // 32) * 32  # when sample i came out: sample 0, then a hop each
        assert not row[pushed:].any(), i
        assert row[pushed - 32 : pushed].any() or i % 32 == 1, i  # which it needed: but for 0 taps


def test_a_bfloat16_stream_is_the_same_but_for_its_rounding(tiny_cfg):
    model = make_model(tiny_cfg.override(*BLOCK_CAUSAL)).eval()
    R = torch.randn(1, 32, 100, dtype=torch.complex64, generator=seeded(1)) * 0.1
    rounding = OnlineEnhancer(model, precision="bf16").sampler
    exact, rounded = frames_of(model.sampler(), R), frames_of(rounding, R)
    error = (rounded - exact).abs().square().sum() / exact.abs().square().sum()
    assert 0 < error < 1e-3  # -30 dB


def test_only_a_network_that_remembers_can_be_made_faster(tiny_cfg):
    model, remembers = (make_model(tiny_cfg.override(*net)) for net in ((), BLOCK_CAUSAL))
    for wish in ({"compiled": True}, {"precision": "bf16"}):
        refused(lambda wish=wish: OnlineEnhancer(model, **wish), "block_causal")
    refused(lambda: OnlineEnhancer(remembers, precision="fp16"), "fp16")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")  # of torch's compiler about itself
def test_a_compiled_stream_is_the_same(tiny_cfg):
    model = make_model(tiny_cfg.override(*BLOCK_CAUSAL))
    signal = torch.randn(3000, generator=seeded(1)) * 0.1
    plain = stream(OnlineEnhancer(model, seed=3), signal, [1000])
    enhancer = OnlineEnhancer(model, seed=3, compiled=True)
    torch.testing.assert_close(stream(enhancer, signal, [7, 500]), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stream(enhancer, signal), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_hour_keeps_its_count_and_memory_and_silence_is_not_slower():
    torch.manual_seed(0)
    model = DiffusionBufferModel(load_config("configs/block_causal_tiny.yaml"))
    enhancer = OnlineEnhancer(model)
    given, minute, sizes, seconds = 0, 60 * 16000, set(), []
    for i in range(60):
        level = 0.0 if i % 2 else 0.1  # a minute of noise, a minute of digital silence, ...
        start = time.process_time()
        out = enhancer.push(level * torch.randn(minute, generator=seeded(i)))
        seconds.append(time.process_time() - start)
        given += out.numel()
        assert minute * (i + 1) - given <= enhancer.latency_samples + 256
        sizes.add(enhancer.state.num_bytes - enhancer.state.waiting.nbytes)
    assert given + enhancer.flush().numel() == 60 * minute
    assert len(sizes) == 1
    assert min(seconds[1::2]) <= 1.2 * min(seconds[::2])
