"""A stream is the whole signal, however it is cut, and knows no future."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffbuf_lib import OnlineEnhancer
from diffbuf_lib.config import build_config
from diffbuf_lib.errors import ShapeError
from tests.conftest import TINY, make_model, seeded


def run(enhancer, signal, cuts):
    pieces, start = [], 0
    for cut in [*sorted(cuts), signal.shape[-1]]:
        pieces.append(enhancer.push(signal[..., start:cut]))
        start = max(start, cut)
    return torch.cat([*pieces, enhancer.flush()], dim=-1)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 700), max_size=6),
    loss=st.sampled_from(["weighted_score", "data_prediction"]),
    n_fft=st.sampled_from([62, 63, 64]),
)
def test_any_cut_gives_the_whole(length, cuts, loss, n_fft):
    cfg = build_config(TINY, [f"training.loss={loss}", f"audio.stft.n_fft={n_fft}"])
    # In float64: compression takes a rounding error of 1e-16 in an empty bin to 1e-8.
    model = make_model(cfg).double()
    signal = torch.randn(length, generator=seeded(length), dtype=torch.float64) * 0.1
    whole = model.enhance(signal[None, None], seeded(7))[0, 0]
    streamed = run(OnlineEnhancer(model, seed=7), signal, [min(cut, length) for cut in cuts])
    assert streamed.shape == signal.shape
    scale = whole.abs().max()
    assert (streamed - whole).abs().max() <= 1e-6 * scale


def test_float32_at_the_papers_stft(tiny_cfg):
    cfg = tiny_cfg.override("audio.stft={}", "audio.chunk_size=16000")
    model, signal = make_model(cfg), torch.randn(9000) * 0.1
    whole = model.enhance(signal[None, None], seeded(2))[0, 0]
    torch.testing.assert_close(
        run(OnlineEnhancer(model, seed=2), signal, [1, 700, 701, 5000]), whole, rtol=1e-5, atol=1e-5
    )


def test_the_first_sample_comes_after_exactly_latency_samples(tiny_cfg):
    enhancer = OnlineEnhancer(make_model(tiny_cfg))
    assert enhancer.latency_samples == 31 + 3 * 32
    assert enhancer.push(torch.randn(enhancer.latency_samples - 1)).numel() == 0
    assert enhancer.push(torch.randn(1)).numel() > 0


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_delay_is_chosen_when_the_stream_starts(tiny_cfg, monkeypatch, delay):
    """A perfect data prediction gives the signal back, at every delay."""
    model = make_model(tiny_cfg.override("training.loss=data_prediction"))
    monkeypatch.setattr(model, "denoise", lambda V, Y, t: (Y[..., -4:], Y[..., -4:]))
    enhancer = OnlineEnhancer(model, delay=delay)
    assert enhancer.latency_samples == 31 + (delay - 1) * 32
    signal = torch.randn(1000)
    torch.testing.assert_close(run(enhancer, signal, [333]), signal, rtol=1e-4, atol=1e-4)


def test_reset_flush_and_neighbours_leave_no_trace(tiny_cfg):
    model = make_model(tiny_cfg)
    signal, other = torch.randn(2, 500)
    fresh = run(OnlineEnhancer(model), signal, [])
    a, b = OnlineEnhancer(model), OnlineEnhancer(model, seed=1)
    a.push(other)
    a.reset()
    first = [a.push(signal[:250]), b.push(other), a.push(signal[250:]), a.flush()]
    assert torch.equal(torch.cat([first[0], first[2], first[3]]), fresh)
    assert torch.equal(run(a, signal, []), fresh)  # after flush


def test_streams_side_by_side(tiny_cfg):
    model = make_model(tiny_cfg)
    signals = torch.randn(3, 400)
    out = run(OnlineEnhancer(model, batch=3), signals, [100, 101])
    assert out.shape == signals.shape
    with pytest.raises(ShapeError, match=r"\[3, T\]"):
        OnlineEnhancer(model, batch=3).push(signals[:2])


def test_nothing_pushed_nothing_out(tiny_cfg):
    assert OnlineEnhancer(make_model(tiny_cfg)).flush().shape == (0,)
