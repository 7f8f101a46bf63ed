"""The cost of a frame of a stream: with the history cached, and recomputed as the authors do."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.real_world import available
from diffbuf_lib import DiffusionBufferModel, OnlineEnhancer, load_config
from diffbuf_lib.diffusion.sampler import BufferSampler
from diffbuf_lib.evaluation.baselines import make_baselines
from diffbuf_lib.live import LiveReport, run_live
from diffbuf_lib.model import load_model
from diffbuf_lib.networks import Precision
from diffbuf_lib.pretrained import DEFAULT

BINS = 256
WINDOWS = (64, 128, 256, 512)  # K, frames
Best = Callable[[Callable[[], Any], int], float]  # shortest time of some repeats, seconds


def stream_model(name: str, frames: int = 128) -> DiffusionBufferModel:
    """An untrained model of configs/`name`.yaml whose network sees K = `frames` frames."""
    cfg = load_config(f"configs/{name}.yaml", [f"diffusion_buffer.num_frames={frames}"])
    torch.manual_seed(0)
    return DiffusionBufferModel(cfg).eval()


def measure(best: Best) -> Iterator[tuple[str, float, str, str]]:
    """Yield (name, value, unit, note) of every measurement."""
    matmul = matmul_gflops(best)
    yield "matrix product", matmul, "GFLOP/s", "2048 x 2048, float32"
    yield from frame_times(best, matmul)
    yield from in_own_process()
    yield from recomputed_ncsnpp(best)
    for name in ("tiny", "cpu", "base"):
        yield from one_core(name, best)
    yield from journals_network(best)
    yield from rivals()
    report = one_minute("block_causal_cpu")
    for label, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("worst", 1.0)):
        note = f"a minute of audio, B 20, hop {report.hop_ms:.0f} ms"
        yield f"cpu size, frame time {label}", report.quantile(q), "ms", note
    note = f"median; p99 {report.quantile(0.99) / report.hop_ms:.2f}; {report.missed} hops late"
    yield "cpu size, real-time factor", report.real_time_factor, "", note


def frame_times(best: Best, matmul: float) -> Iterator[tuple[str, float, str, str]]:
    """Yield one frame of the cpu size at several K, with and without the cache."""
    for frames in WINDOWS:
        model = stream_model("block_causal_cpu", frames)
        cached, flop = one_frame(model.sampler(), best, 30)
        note = f"{flop:.2f} GFLOP, {flop / cached / matmul:.0%} of a matrix product's speed"
        yield f"cpu size, frame, cached, K {frames}", 1e3 * cached, "ms", note
        again, flop = one_frame(model.sampler(cached=False), best, 5)
        note = f"{flop:.2f} GFLOP, {again / cached:.1f} times the cached frame"
        yield f"cpu size, frame, recomputed, K {frames}", 1e3 * again, "ms", note


def journals_network(best: Best) -> Iterator[tuple[str, float, str, str]]:
    """Yield the time of the journal's network for a frame, and for a window of 128 frames."""
    model = stream_model("journal_bc_ncsnpp")
    seconds, flop = one_frame(model.sampler(), best, 5)
    yield "bc_ncsnpp, frame", 1e3 * seconds, "ms", f"{flop:.1f} GFLOP, B 16"
    x, t = torch.randn(1, 4, BINS, 128), torch.linspace(0.03, 0.8, 16)[None]
    with torch.inference_mode():
        whole = best(lambda: model.network(x, t), 3)
    yield "bc_ncsnpp, window of 128 frames", 1e3 * whole, "ms", "a training step's forward pass"


def rivals() -> Iterator[tuple[str, float, str, str]]:
    """Yield the real-time factors of the bundled model and of small rivals, in turn, on one thread.

    Our model and GTCRN run hop by hop; the C libraries of the others work at 48 kHz, and the time
    for resampling is included.
    """
    seconds, rate, rounds = 4, 16000, 5
    wave = 0.1 * torch.randn(seconds * rate, generator=torch.Generator().manual_seed(0))
    model = load_model(DEFAULT, "cpu")
    runs: dict[str, Callable[[], Any]] = {}
    with threads(1):
        for backend in ("torch", "onnx"):
            enhancer = OnlineEnhancer(model, backend=backend)
            hops = wave.split(model.cfg.audio.stft.hop_length)
            runs[f"{DEFAULT}, {backend}"] = partial(
                lambda e, h: [e.push(x) for x in h], enhancer, hops
            )
        for name, method in make_baselines(available()).items():
            if "noisereduce" not in name:  # not online
                runs[name] = partial(method, wave, rate)
        medians([*runs.values()], rounds=1, each=1)  # warming up
        times = medians([*runs.values()], rounds, each=1)
    for name, found in zip(runs, times, strict=True):
        note = f"one thread, median of {rounds} in turn"
        yield f"real-time factor, {name}", found / seconds, "", note


def in_own_process() -> Iterator[tuple[str, float, str, str]]:
    """Yield `gains`, measured in a fresh process, like that of a stream.

    What a process has freed before affects how the C library allocates memory, and therefore how
    fast a recomputed frame, which needs megabytes, can be.
    """
    code = "import json; from benchmarks.streaming import gains; print(json.dumps([*gains()]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    for row in json.loads(done.stdout.splitlines()[-1]):
        yield tuple(row)


def gains() -> Iterator[tuple[str, float, str, str]]:
    """Yield the cache's speed-up at K = 128, with all threads and with one.

    Ten frames of each kind in turn, many times, and the median frame of each, so that other load
    on the machine slows all kinds equally.
    """
    model = stream_model("block_causal_cpu")
    for parameter in model.parameters():  # or its last layers are zero, and so is every error
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    wishes: tuple[tuple[str, bool, Precision], ...] = (
        ("bf16", False, "bf16"),
        ("compiled", True, "fp32"),
        ("compiled, bf16", True, "bf16"),
    )
    for count in (torch.get_num_threads(), 1):
        samplers = {"recomputed": model.sampler(cached=False), "cached": model.sampler()}
        for label, compiled, precision in wishes:
            faster = model.sampler(compiled=compiled, precision=precision)
            samplers[f"cached, {label}"] = faster
        notes = {}
        with threads(count):  # a graph is compiled for a number of threads
            exact = some_frames(samplers["cached"])
            for name, sampler in samplers.items():
                error = some_frames(sampler) - exact  # which also compiles
                level = 20 * torch.log10(error.abs().norm() / exact.abs().norm()).item()
                same = "; to the bit the cached frame" if error.eq(0).all() else ""
                notes[name] = same or f"; {level:.0f} dB from the cached frame"
            times = medians([frame(sampler) for sampler in samplers.values()], rounds=8)
        again = times[0]
        for name, seconds in zip(samplers, times, strict=True):
            note = f"{1e3 * seconds:.2f} ms{notes[name]}"
            label = f"cpu size, K 128, {count} threads: recomputed over {name}"
            yield label, again / seconds, "times", note


def medians(functions: list[Callable[[], Any]], rounds: int, each: int = 10) -> list[float]:
    """Return the median seconds of functions that are called in turn, `each` times in a row."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, seconds, strict=True):
            for _ in range(each):
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def frame(sampler: BufferSampler) -> Callable[[], Any]:
    """Return a function that feeds one frame into a stream of its own."""
    R, state = torch.randn(1, BINS, dtype=torch.complex64), sampler.start(1, BINS)

    def step() -> None:
        with torch.inference_mode():
            sampler.step(state, R)

    return step


def some_frames(sampler: BufferSampler) -> torch.Tensor:
    """What a sampler makes of 60 frames of noise."""
    generator = torch.Generator().manual_seed(0)
    state = sampler.start(1, BINS, generator)
    with torch.inference_mode():
        R = 0.3 * torch.randn(60, 1, BINS, dtype=torch.complex64, generator=generator)
        return torch.stack([sampler.step(state, r, generator) for r in R])


def recomputed_ncsnpp(best: Best) -> Iterator[tuple[str, float, str, str]]:
    """Yield one frame of the paper's network, which recomputes all K frames for each."""
    for frames in WINDOWS:
        model = stream_model("9_Diffusion_Buffer_BBED", frames)
        seconds, flop = one_frame(model.sampler(), best, 1)
        note = f"{flop:.0f} GFLOP; real-time factor {seconds / 0.016:.1f}"
        yield f"ncsnpp, frame, recomputed, K {frames}", 1e3 * seconds, "ms", note


def one_core(name: str, best: Best) -> Iterator[tuple[str, float, str, str]]:
    """Yield memory of a stream, and how many streams one thread keeps up with."""
    model = stream_model(f"block_causal_{name}")
    size = OnlineEnhancer(model).state.num_bytes
    with threads(1):
        seconds, flop = one_frame(model.sampler(), best, 10)
    yield f"{name} size, memory a stream", size / 1024, "KiB", "whatever K is"
    note = f"{flop:.3f} GFLOP and {1e3 * seconds:.2f} ms a frame on one thread"
    yield f"{name} size, streams a core", 0.016 / seconds, "", note


def one_minute(name: str) -> LiveReport:
    """Enhance a minute of noise hop by hop, as fast as it goes, after a second of warming up."""
    model = stream_model(name)
    audio = model.cfg.audio
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(61 * audio.sample_rate, generator=generator)
    hop, second = audio.stft.hop_length, audio.sample_rate
    enhancer = OnlineEnhancer(model)
    enhancer.push(noise[:second])
    return run_live(enhancer, noise[second:].split(hop), lambda _: None)


def one_frame(sampler: BufferSampler, best: Best, repeats: int) -> tuple[float, float]:
    """Return seconds and GFLOP of one frame."""
    step, counter = frame(sampler), FlopCounterMode(display=False)
    with counter:
        step()
    return best(step, repeats), counter.get_total_flops() / 1e9


def matmul_gflops(best: Best) -> float:
    """GFLOP/s of a plain float32 matrix product."""
    a = torch.randn(2048, 2048)
    with torch.inference_mode():
        return 2 * 2048**3 / best(lambda: a @ a, 5) / 1e9


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
