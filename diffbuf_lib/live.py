"""Run a stream at its own pace, and say honestly whether this machine keeps up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.streaming import OnlineEnhancer


@dataclass(frozen=True)
class LiveReport:
    """How a stream kept up. Times are those of one hop: analysis, network, synthesis.

    Attributes:
        hop_ms: time that one hop of audio lasts, ms: the limit.
        frame_ms: time that each hop took, ms.
        missed: hops that were not ready when the next one was due. They are late, never dropped.
        latency_ms: algorithmic latency, ms: samples to be pushed before the first comes out.
        realtime: whether the input was fed at its own pace.
    """

    hop_ms: float
    frame_ms: tuple[float, ...]
    missed: int
    latency_ms: float
    realtime: bool

    @property
    def real_time_factor(self) -> float:
        """Median time of a hop over its duration: below 1 keeps up."""
        return self.quantile(0.5) / self.hop_ms

    def quantile(self, q: float) -> float:
        """The time that a share `q` of the hops does not exceed, ms (nearest rank)."""
        if not self.frame_ms:
            return 0.0
        ordered = sorted(self.frame_ms)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)]

    def __str__(self) -> str:
        p50, p95, p99, worst = (self.quantile(q) for q in (0.5, 0.95, 0.99, 1.0))
        pace = "fed in real time" if self.realtime else "fed as fast as it was taken"
        return (
            f"{len(self.frame_ms)} hops of {self.hop_ms:.1f} ms, {pace}\n"
            f"real-time factor {self.real_time_factor:.3f} (median)\n"
            f"frame time p50 {p50:.2f}  p95 {p95:.2f}  p99 {p99:.2f}  worst {worst:.2f} ms\n"
            f"missed deadlines {self.missed}\n"
            f"latency {self.latency_ms:.1f} ms, and up to one hop of waiting and the frame time"
        )


@dataclass(frozen=True)
class LatencyReport:
    """What a stream of one model costs on this machine.

    Attributes:
        latency_samples: samples to be pushed before the first one comes out.
        latency_ms: the same in ms.
        hop_ms: duration of one hop, ms.
        frame_ms: median time of a hop, ms.
        fastest_ms: shortest time of a hop, ms; what a quiet machine would need.
        state_bytes: memory of one stream.
        weight_bytes: memory of the model, shared by all streams.
        threads: torch's threads.
    """

    latency_samples: int
    latency_ms: float
    hop_ms: float
    frame_ms: float
    fastest_ms: float
    state_bytes: int
    weight_bytes: int
    threads: int

    @property
    def real_time_factor(self) -> float:
        """Median time of a hop over its duration."""
        return self.frame_ms / self.hop_ms


class LiveHop(NamedTuple):
    """What became of one hop.

    Attributes:
        ready: [T'] samples that came out.
        milliseconds: that it took.
        late: whether it was not ready when the next one was due.
    """

    ready: Tensor
    milliseconds: float
    late: bool


def live_hops(
    enhancer: OnlineEnhancer,
    hops: Iterable[Tensor],
    *,
    realtime: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Generator[LiveHop, None, None]:
    """Feed a stream hop by hop; arguments as in `run_live`. The end is the caller's to flush."""
    cfg = enhancer.model.cfg.audio
    hop_seconds = cfg.stft.hop_length / cfg.sample_rate
    start = clock()
    for index, hop in enumerate(hops):
        arrival = start + (index + 1) * hop_seconds
        if realtime and (wait := arrival - clock()) > 0:
            sleep(wait)
        begun = clock()
        ready = enhancer.push(hop)
        ended = clock()
        late = ended > (arrival if realtime else begun) + hop_seconds
        yield LiveHop(ready, 1e3 * (ended - begun), late)


def make_report(
    enhancer: OnlineEnhancer, times: Iterable[float], missed: int, realtime: bool
) -> LiveReport:
    """Sum up a stream: milliseconds of its hops, and how many were late."""
    cfg = enhancer.model.cfg.audio
    return LiveReport(
        hop_ms=1e3 * cfg.stft.hop_length / cfg.sample_rate,
        frame_ms=tuple(times),
        missed=missed,
        latency_ms=1e3 * enhancer.latency_samples / cfg.sample_rate,
        realtime=realtime,
    )


def run_live(
    enhancer: OnlineEnhancer,
    hops: Iterable[Tensor],
    sink: Callable[[Tensor], object],
    *,
    realtime: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> LiveReport:
    """Feed a stream hop by hop, and measure.

    With `realtime`, hop i is pushed when its last sample would have arrived, i + 1 hops after the
    start, and is late if it is not ready one hop later. Without, a hop is late if it took longer
    than it lasts. Late hops are counted and still put out. Ctrl-C ends the stream as the end of
    the input does.

    Args:
        enhancer: of one stream.
        hops: [T] each, hop_length samples; the last may be shorter.
        sink: is given what comes out, [T'], the end of the stream included.
        realtime: wait for each hop; not for sources that set the pace themselves.
        clock: seconds, rising.
        sleep: waits for that many seconds.
    """
    times, missed = [], 0
    with suppress(KeyboardInterrupt):
        for hop in live_hops(enhancer, hops, realtime=realtime, clock=clock, sleep=sleep):
            sink(hop.ready)
            times.append(hop.milliseconds)
            missed += hop.late
    sink(enhancer.flush())
    return make_report(enhancer, times, missed, realtime)


def latency_report(
    model: DiffusionBufferModel, delay: int | None = None, hops: int = 50
) -> LatencyReport:
    """Measure one stream of noise on this machine.

    Args:
        model: any; on the device where it is.
        delay: d, 1 to B frames, of a data-prediction model; None for B.
        hops: how many are timed, after B that are not.
    """
    cfg = model.cfg.audio
    enhancer = OnlineEnhancer(model, delay=delay)
    warm = model.cfg.diffusion_buffer.buffer_size
    noise = torch.randn(
        warm + hops, cfg.stft.hop_length, generator=torch.Generator().manual_seed(0)
    )
    report = run_live(enhancer, noise * 0.1, lambda _: None)
    state_bytes = enhancer.state.num_bytes
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    timed = report.frame_ms[warm:]
    return LatencyReport(
        latency_samples=enhancer.latency_samples,
        latency_ms=report.latency_ms,
        hop_ms=report.hop_ms,
        frame_ms=statistics.median(timed),
        fastest_ms=min(timed),
        state_bytes=state_bytes,
        weight_bytes=weights,
        threads=torch.get_num_threads(),
    )
