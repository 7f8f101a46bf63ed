"""The live report on a fake clock, and streams through files and pipes."""

import io
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import diffbuf_lib.live
from diffbuf_lib import OnlineEnhancer
from diffbuf_lib.errors import DataError, MissingExtraError
from diffbuf_lib.live import choose_threads, latency_report, run_live, run_microphone, stream_path
from tests.conftest import make_model, stream

pytestmark = pytest.mark.law
HOP = 32  # 2 ms of tiny_cfg


class Clock:
    """Time that passes only by sleeping and by pushing, in ms."""

    def __init__(self, costs):
        self.now, self.costs, self.slept = 0.0, iter(costs), []

    def perf_counter(self):
        return self.now / 1e3

    def sleep(self, seconds):
        self.slept.append(1e3 * seconds)
        self.now += 1e3 * seconds

    def enhancer(self, cfg):
        def push(hop):
            self.now += next(self.costs)
            return hop

        return SimpleNamespace(
            push=push, flush=lambda: torch.zeros(0), latency_samples=127, worst_latency_samples=158,
            model=SimpleNamespace(cfg=cfg, parameters=list),
            state=SimpleNamespace(num_bytes=0, bad=3),
        )  # fmt: skip


def live(cfg, costs, realtime):
    clock, out, hops = Clock(costs), [], [torch.ones(HOP)] * len(costs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffbuf_lib.live, "time", clock)
        report = run_live(clock.enhancer(cfg), hops, out.append, realtime=realtime)
    assert sum(piece.numel() for piece in out) == HOP * len(costs)  # late, never dropped
    return report, clock


def test_a_late_hop_is_counted_and_delays_the_next_ones(tiny_cfg):
    """Hops of 2 ms: one takes 5 ms, and the next two are late because of it."""
    report, clock = live(tiny_cfg, [1, 5, 1, 0.5, 1], realtime=True)
    assert (report.missed, report.hop_ms, report.bad) == (3, 2, 3)
    assert clock.slept == pytest.approx([2, 1])
    assert report.frame_ms == pytest.approx((1, 5, 1, 0.5, 1))
    assert report.real_time_factor == pytest.approx(0.5)
    assert (report.latency_ms, report.worst_latency_ms) == (127 / 16, 158 / 16)
    assert "3 samples" in str(report)
    # By themselves, where nothing waits.
    report, clock = live(tiny_cfg, [1, 5, 1, 2.5], realtime=False)
    assert (report.missed, clock.slept) == (2, [])
    report, _ = live(tiny_cfg, [i / 100 for i in range(1, 101)], realtime=False)
    assert [report.quantile(q) for q in (0.5, 0.95, 1)] == pytest.approx([0.51, 0.96, 1])
    assert live(tiny_cfg, [], realtime=True)[0].real_time_factor == 0


@pytest.mark.parametrize(("slow", "chosen"), [(0.1, 2), (9.0, 1)])
def test_a_stream_takes_the_threads_that_keep_up(tiny_cfg, monkeypatch, slow, chosen):
    threads, times = [2], {2: slow, 1: 1.0}
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    measured = lambda *_, **__: SimpleNamespace(quantile=lambda q: times[threads[-1]])  # noqa: E731
    monkeypatch.setattr(diffbuf_lib.live, "latency_report", measured)
    assert choose_threads(make_model(tiny_cfg)) == chosen == threads[-1]


def test_latency_report(tiny_cfg):
    model = make_model(tiny_cfg.override("training.loss=data_prediction"))
    report = latency_report(model, delay=2, hops=5)
    assert report.latency_ms == pytest.approx((31 + 32) / 16)
    assert (report.hop_ms, len(report.frame_ms)) == (2, 5)
    assert report.real_time_factor == sorted(report.frame_ms)[2] / 2 > 0
    assert report.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert report.state_bytes >= 2 * 8 * 32 * 10  # V and Y, complex, [F, K]


def test_the_microphone_is_enhanced_until_ctrl_c(tiny_cfg, monkeypatch):
    model, played = make_model(tiny_cfg), []
    blocks = torch.randn(8, HOP, 1, generator=torch.Generator().manual_seed(0)).numpy()

    @contextmanager
    def card(*, samplerate, blocksize, **_):
        assert (samplerate, blocksize) == (16000, HOP)
        left = iter(blocks)

        def read(frames):
            for block in left:
                return block, len(played) == 3
            raise KeyboardInterrupt

        yield SimpleNamespace(read=read, write=played.append)

    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingExtraError, match=r"diffbuf\[mic\]"):
        run_microphone(OnlineEnhancer(model))
    fake = SimpleNamespace(Stream=card, PortAudioError=OSError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    report = run_microphone(OnlineEnhancer(model))
    expected = stream(OnlineEnhancer(model), torch.from_numpy(blocks.ravel()))
    np.testing.assert_array_equal(np.concatenate(played)[:, 0], expected.numpy())
    assert len(report.frame_ms) == 8
    assert report.missed >= 1  # what the card lost


def test_a_pipe_through_the_command_line(tiny_cfg, tmp_path):
    """Raw s16le in and out, the report on stderr; the numbers are those of a file."""
    model = make_model(tiny_cfg.override("training.loss=data_prediction"))
    model.save_pretrained(tmp_path / "model")
    pcm = (3000 * np.random.default_rng(0).standard_normal(1001)).astype("<i2")
    done = subprocess.run(
        [
            sys.executable, "-c", "from diffbuf_lib.cli import main; main()", "stream", "-", "-",
            "--model", str(tmp_path / "model"), "--delay", "2", "--threads", "1", "--seed", "3",
        ],
        input=pcm.tobytes() + b"\0", capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = np.frombuffer(done.stdout, "<i2")
    samples = torch.from_numpy(pcm.astype(np.float32) / 32768)
    expected = stream(OnlineEnhancer(model, seed=3, delay=2), samples) * 32768
    assert len(out) == 1001
    np.testing.assert_allclose(out, expected.clamp(-32768, 32767).numpy(), atol=1)
    assert b"real-time factor" in done.stderr


def through_a_pipe(model, content, monkeypatch, tmp_path, **more):
    """Stream bytes on stdin to a file; return its samples."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    stream_path(OnlineEnhancer(model), Path("-"), tmp_path / "out.wav", **more)
    return soundfile.read(tmp_path / "out.wav", dtype="float32")[0]


@pytest.mark.parametrize(
    ("kind", "subtype", "sizes"),
    [("WAV", "PCM_16", None), ("WAV", "PCM_16", 0), ("WAV", "FLOAT", 0xFFFFFFFF),
     ("WAV", "PCM_U8", None), ("WAV", "PCM_24", None), ("WAVEX", "PCM_32", None),
     ("WAV", "ULAW", None), ("RF64", "PCM_16", None)],
)  # fmt: skip
def test_file_and_pipe_come_out_as_the_enhancer_gives_them(
    tiny_cfg, monkeypatch, tmp_path, kind, subtype, sizes
):
    model, source, clean = make_model(tiny_cfg), tmp_path / "in.wav", tmp_path / "a" / "out.wav"
    wave = 0.1 * np.random.default_rng(0).standard_normal((1003, 2))
    soundfile.write(source, wave, 16000, subtype, format=kind)
    wave, _ = soundfile.read(source, dtype="float32")
    expected = stream(OnlineEnhancer(model), torch.from_numpy(wave.mean(1))).numpy()
    report = stream_path(OnlineEnhancer(model), source, clean)
    out, rate = soundfile.read(clean, dtype="float32")
    assert (rate, len(report.frame_ms)) == (16000, -(-1003 // HOP))
    np.testing.assert_allclose(out, expected, atol=1e-6)
    content = source.read_bytes()
    if sizes is None:
        content += b"LIST" + (400).to_bytes(4, "little") + bytes(400)  # is no sound
    else:
        at = content.index(b"data") + 4
        sizes = sizes.to_bytes(4, "little")
        content = content[:4] + sizes + content[8:at] + sizes + content[at + 4 :]
    pipes = [(content, {})]
    if subtype == "PCM_16":
        pipes.append(((32768 * wave).astype("<i2").tobytes(), {"channels": 2, "rate": 16000}))
    for content, more in pipes:
        out = through_a_pipe(model, content, monkeypatch, tmp_path, **more)
        np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [(bytes(99), {"rate": 8000}, "8000 Hz and the model at 16000"),
     (b"RIFF\0\0\0\0WAVEfmt ", {}, "ends before"), (b"ID3" + bytes(99), {}, "ffmpeg")],
)  # fmt: skip
def test_pipes_that_are_no_pcm_of_the_models_rate_are_refused(
    tiny_cfg, monkeypatch, tmp_path, content, more, message
):
    with pytest.raises(DataError, match=message):
        through_a_pipe(make_model(tiny_cfg), content, monkeypatch, tmp_path, **more)
    assert not (tmp_path / "out.wav").exists()
