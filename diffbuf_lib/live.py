"""A live stream: from file, pipe or microphone, hop by hop, to file, pipe or headphones.

Every hop is timed, to report whether this machine keeps up.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import soundfile
import torch
from torch import Tensor

from diffbuf_lib.data.audio import audio_output, refuse_same_file
from diffbuf_lib.data.reader import AudioReader
from diffbuf_lib.data.riff import WavHeader, read_wav_header
from diffbuf_lib.errors import ConfigError, DataError, MissingExtraError, need
from diffbuf_lib.graph import Backend
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.streaming import OnlineEnhancer

PIPE = Path("-")
# First bytes of files that would be noise if they were read as raw samples.
_NO_PCM = (b"fLaC", b"OggS", b"FORM", b"ID3", b"caff", b".snd", b"riff")


def stream_path(
    enhancer: OnlineEnhancer,
    source: Path,  # at the model's rate; channels are averaged; `-`: WAV or s16le on stdin
    output: Path,  # .wav, written as 32-bit float, or .flac; `-`: raw s16le on stdout
    *,
    realtime: bool = False,  # feed a file at its own pace; a pipe sets its own
    rate: int | None = None,  # Hz, of raw PCM; None for the model's
    channels: int = 1,  # of raw PCM, interleaved
    repair: bool = False,  # take NaN and Inf in a file as zeros instead of refusing it
) -> LiveReport:
    """Enhance a file or pipe, hop by hop, with an enhancer of one stream.

    Raises DataError for a file that cannot be read or written, has another rate, or is the output.
    """
    cfg = enhancer.model.cfg.audio
    hop = cfg.stft.hop_length
    with ExitStack() as opened:
        file = None
        if source == PIPE:
            found, hops = read_pipe(sys.stdin.buffer, hop, rate or cfg.sample_rate, channels)
        else:
            file = opened.enter_context(AudioReader(source, repair=repair))
            found = file.sample_rate
            hops = (torch.from_numpy(block[:, 0]) for block in file.blocks(hop, mono=True))
        if found != cfg.sample_rate:
            rates = f"at {found} Hz and the model at {cfg.sample_rate} Hz"
            why = "a live stream is not resampled; diffbuf enhance takes any rate"
            raise DataError(f"{source if file else 'stdin'} is {rates}: {why}")
        sink: Callable[[Tensor], object] = partial(write_pcm, sys.stdout.buffer)
        if output != PIPE:
            if source != PIPE:
                refuse_same_file(source, output)
            out = opened.enter_context(audio_output(output, cfg.sample_rate, 1, atomic=False))
            sink = lambda samples: out.write(samples.numpy())  # noqa: E731
        report = run_live(enhancer, hops, sink, realtime=realtime and source != PIPE)
        if file is not None:
            file.warn()
    return report


def run_microphone(enhancer: OnlineEnhancer) -> LiveReport:
    """Enhance and play the microphone until Ctrl-C; wear headphones to avoid feedback.

    Hops that the sound card lost because they were not fetched in time count as missed.
    Raises MissingExtraError without sounddevice, ConfigError without a card of the model's rate.
    """
    install = "pip install 'diffbuf[mic]', and on Linux apt install libportaudio2"
    sounddevice = need("sounddevice", "--device mic", install)
    rate, hop = enhancer.model.cfg.audio.sample_rate, enhancer.model.cfg.audio.stft.hop_length
    lost = 0

    def recorded(card: Any) -> Iterator[Tensor]:
        nonlocal lost
        while True:
            block, overflowed = card.read(hop)
            lost += overflowed
            yield torch.from_numpy(block[:, 0].copy())

    try:
        settings = {"samplerate": rate, "blocksize": hop, "channels": 1, "dtype": "float32"}
        with sounddevice.Stream(**settings) as card:
            play = lambda out: card.write(out.unsqueeze(1).numpy())  # noqa: E731
            report = run_live(enhancer, recorded(card), play)
    except sounddevice.PortAudioError as error:
        raise ConfigError(f"--device mic: the sound card is unusable: {error}") from error
    return replace(report, missed=report.missed + lost)


def run_live(
    enhancer: OnlineEnhancer,
    hops: Iterable[Tensor],  # [T] each, hop_length samples; the last may be shorter
    sink: Callable[[Tensor], object],  # receives the output, [T'], including the stream's end
    *,
    realtime: bool = False,  # wait for each hop; not for sources that set the pace themselves
) -> LiveReport:
    """Feed one stream hop by hop, and time it. Ctrl-C ends it like the end of the input."""
    times, missed = [], 0
    with suppress(KeyboardInterrupt):
        for hop in live_hops(enhancer, hops, realtime=realtime):
            sink(hop.ready)
            times.append(hop.milliseconds)
            missed += hop.late
    report = make_report(enhancer, times, missed, realtime)
    sink(enhancer.flush())
    return report


class LiveHop(NamedTuple):
    """The result of one hop."""

    ready: Tensor  # [T'] samples that came out
    milliseconds: float  # that it took
    late: bool  # whether it was not ready when the next one was due


def live_hops(
    enhancer: OnlineEnhancer, hops: Iterable[Tensor], *, realtime: bool = False
) -> Generator[LiveHop, None, None]:
    """Feed a stream hop by hop; arguments as in `run_live`. The caller flushes the end.

    With `realtime`, hop i is pushed when its last sample would have arrived, i + 1 hops after the
    start, and is late if it is not ready one hop later. Otherwise a hop is late if it took
    longer than it lasts. Late hops are counted, and still output.
    """
    cfg = enhancer.model.cfg.audio
    hop_seconds = cfg.stft.hop_length / cfg.sample_rate
    start = time.perf_counter()
    for index, hop in enumerate(hops):
        arrival = start + (index + 1) * hop_seconds
        if realtime and (wait := arrival - time.perf_counter()) > 0:
            time.sleep(wait)
        begun = time.perf_counter()
        ready = enhancer.push(hop)
        ended = time.perf_counter()
        late = ended > (arrival if realtime else begun) + hop_seconds
        yield LiveHop(ready, 1e3 * (ended - begun), late)


def make_report(
    enhancer: OnlineEnhancer, times: Iterable[float], missed: int, realtime: bool
) -> LiveReport:
    """Summarise a stream that is not flushed yet: its hops' milliseconds, how many were late."""
    cfg = enhancer.model.cfg.audio
    return LiveReport(
        hop_ms=1e3 * cfg.stft.hop_length / cfg.sample_rate,
        frame_ms=tuple(times),
        missed=missed,
        latency_ms=1e3 * enhancer.latency_samples / cfg.sample_rate,
        worst_latency_ms=1e3 * enhancer.worst_latency_samples / cfg.sample_rate,
        realtime=realtime,
        bad=enhancer.state.bad,
        state_bytes=enhancer.state.num_bytes,
        weight_bytes=sum(p.nbytes for p in enhancer.model.parameters()),
    )


@dataclass(frozen=True)
class LiveReport:
    """How a stream kept up. Times are those of one hop: analysis, network, synthesis."""

    hop_ms: float  # duration of one hop of audio: the limit
    frame_ms: tuple[float, ...]  # time that each hop took
    missed: int  # hops that were not ready when the next one was due: late, never dropped
    latency_ms: float  # algorithmic: audio to push before the first sample comes out
    worst_latency_ms: float  # the longest that any sample waits for later ones
    realtime: bool  # whether the input was fed at its own pace
    bad: int  # samples that were NaN or Inf, and taken as zeros
    state_bytes: int  # memory of the stream
    weight_bytes: int  # memory of the model, shared by all streams

    @property
    def real_time_factor(self) -> float:
        """Median time of a hop over its duration; below 1, the machine keeps up."""
        return self.quantile(0.5) / self.hop_ms

    def quantile(self, q: float) -> float:
        """Return the time that a share `q` of the hops does not exceed, ms (nearest rank)."""
        ordered = sorted(self.frame_ms) or [0.0]
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)]

    def __str__(self) -> str:
        p50, p95, p99, worst = (self.quantile(q) for q in (0.5, 0.95, 0.99, 1.0))
        pace = "fed in real time" if self.realtime else "fed as fast as possible"
        hint = "" if not self.missed else ": another process on these cores? see --threads, --delay"
        bad = f"\n{self.bad} samples were NaN or Inf and taken as zeros" if self.bad else ""
        return (
            f"{len(self.frame_ms)} hops of {self.hop_ms:.1f} ms, {pace}\n"
            f"real-time factor {self.real_time_factor:.3f} (median)\n"
            f"frame time p50 {p50:.2f}  p95 {p95:.2f}  p99 {p99:.2f}  worst {worst:.2f} ms\n"
            f"missed deadlines {self.missed}{hint}\n"
            f"latency {self.latency_ms:.1f} ms to the first sample, {self.worst_latency_ms:.1f} ms "
            f"at worst, plus the time of a frame{bad}"
        )


def choose_backend(model: DiffusionBufferModel, delay: int | None = None) -> tuple[Backend, str]:
    """Return the backend with the faster hops on one thread, and why ONNX is impossible, if it is.

    The first call makes a graph, which takes half a minute.
    """
    several = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        graph = latency_report(model, delay, hops=20, backend="onnx").quantile(0.5)
        faster = graph < latency_report(model, delay, hops=20).quantile(0.5)
    except (ConfigError, MissingExtraError) as error:
        return "torch", str(error)
    finally:
        torch.set_num_threads(several)
    return ("onnx" if faster else "torch"), ""


def choose_threads(
    model: DiffusionBufferModel, delay: int | None = None, backend: Backend = "torch"
) -> int:
    """Set torch's threads to 1, or keep them, whichever is faster; return their number.

    Several threads wait for each other at every operation: next to another process on the same
    cores, a hop takes many times as long on two threads as on one. The 90 % quantile of hop times
    over less than a second of noise decides.
    """
    several = torch.get_num_threads()
    if several > 1:
        slow = latency_report(model, delay, hops=20, backend=backend).quantile(0.9)
        torch.set_num_threads(1)
        if slow < latency_report(model, delay, hops=20, backend=backend).quantile(0.9):
            torch.set_num_threads(several)
    return torch.get_num_threads()


def streams_in_time(
    model: DiffusionBufferModel, backend: Backend = "torch", hops: int = 125
) -> tuple[int, LiveReport]:
    """Return how many streams, in one call, meet every deadline on torch's threads, and a report.

    The report is that of so many streams, or of one if not even one keeps up.
    """
    reports: dict[int, LiveReport] = {}

    def in_time(streams: int) -> bool:
        reports[streams] = latency_report(model, hops=hops, backend=backend, batch=streams)
        return reports[streams].quantile(1.0) < reports[streams].hop_ms

    most, too_many = 0, 1
    while in_time(too_many):
        most, too_many = too_many, 2 * too_many
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if in_time(middle) else (most, middle)
    return most, reports[max(most, 1)]


def latency_report(
    model: DiffusionBufferModel, delay: int | None = None, hops: int = 50, **options: Any
) -> LiveReport:
    """Time `hops` hops of noise on the model's device, after B untimed ones.

    Delay and options, such as batch and backend, are those of `OnlineEnhancer`.
    """
    enhancer = OnlineEnhancer(model, delay=delay, **options)
    warm, hop = model.cfg.diffusion_buffer.buffer_size, model.cfg.audio.stft.hop_length
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(warm + hops, enhancer.batch, hop, generator=generator)
    times = [hop.milliseconds for hop in live_hops(enhancer, 0.1 * noise)]
    return make_report(enhancer, times[warm:], missed=0, realtime=False)


def read_pipe(
    stream: BinaryIO, hop: int, rate: int, channels: int = 1
) -> tuple[int, Iterator[Tensor]]:
    """Detect what a pipe sends: a WAV, or otherwise raw s16le PCM of this rate and channels.

    Returns its rate, Hz, and pieces [hop] float32, full scale 1, channels averaged, as they arrive.
    Raises DataError for another format, or a codec that is not PCM.
    """
    head = b""
    while len(head) < 12 and (more := stream.read(12 - len(head))):
        head += more
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        header = read_wav_header(stream)
        return header.sample_rate, _pieces(stream, b"", hop, header)
    if head.startswith(_NO_PCM):
        kind = head[:4].decode(errors="replace")
        raise DataError(f"stdin begins with {kind}: send WAV, as with ffmpeg -i pipe: -f wav pipe:")
    header = WavHeader("PCM_16", rate, channels, 2 * channels, None)
    return rate, _pieces(stream, head, hop, header)


def _pieces(stream: BinaryIO, head: bytes, hop: int, header: WavHeader) -> Iterator[Tensor]:
    """Decode what `header` describes, starting with `head`, which has been read already."""
    left = header.num_bytes
    while True:
        wanted = hop * header.frame_bytes - len(head)
        data = head + stream.read(wanted if left is None else min(wanted, left))
        left = None if left is None else left - len(data)
        head = b""
        whole = len(data) // header.frame_bytes * header.frame_bytes  # a pipe may be cut anywhere
        if not whole:
            return
        samples, _ = soundfile.read(
            io.BytesIO(data[:whole]), dtype="float32", always_2d=True, format="RAW",
            endian="LITTLE", subtype=header.subtype, samplerate=header.sample_rate,
            channels=header.channels,
        )  # fmt: skip
        yield torch.from_numpy(samples.mean(axis=1))


def write_pcm(stream: BinaryIO, samples: Tensor) -> None:
    """Write samples [T] as raw s16le, clipped to full scale, and flush."""
    pcm = (samples * 32768).round().clamp(-32768, 32767).to(torch.int16)
    stream.write(pcm.numpy().tobytes())
    stream.flush()
