"""Where a live stream comes from and goes to: files, pipes of raw PCM, the sound card."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import soundfile
import torch
from torch import Tensor

from diffbuf_lib.data.audio import read_info
from diffbuf_lib.errors import ConfigError, DataError, MissingExtraError
from diffbuf_lib.live import LiveReport, run_live
from diffbuf_lib.streaming import OnlineEnhancer

PIPE = Path("-")


def stream_path(
    enhancer: OnlineEnhancer, source: Path, output: Path, *, realtime: bool = False
) -> LiveReport:
    """Enhance a file or pipe, hop by hop.

    Args:
        enhancer: of one stream.
        source: a file of the model's sample rate, its channels averaged to mono; `-` for raw
            s16le mono PCM of that rate on stdin.
        output: .wav, written as 32-bit float, or .flac; `-` for raw s16le on stdout.
        realtime: feed a file at its own pace. A pipe sets its own.

    Raises:
        DataError: a file that cannot be read or written, or of another sample rate.
    """
    cfg = enhancer.model.cfg.audio
    hop = cfg.stft.hop_length
    with ExitStack() as opened:
        if source == PIPE:
            hops = read_pcm(sys.stdin.buffer, hop)
        else:
            if (rate := read_info(source).sample_rate) != cfg.sample_rate:
                raise DataError(
                    f"{source} is at {rate} Hz and the model at {cfg.sample_rate} Hz: a live "
                    "stream is not resampled; diffbuf enhance takes any rate"
                )
            hops = _file_hops(opened.enter_context(soundfile.SoundFile(source)), hop)
        sink: Callable[[Tensor], object]
        if output == PIPE:
            sink = lambda samples: write_pcm(sys.stdout.buffer, samples)  # noqa: E731
        else:
            file = opened.enter_context(_written(output, cfg.sample_rate))
            sink = lambda samples: file.write(samples.numpy())  # noqa: E731
        return run_live(enhancer, hops, sink, realtime=realtime and source != PIPE)


def _file_hops(file: soundfile.SoundFile, hop: int) -> Iterator[Tensor]:
    for block in file.blocks(hop, dtype="float32", always_2d=True):
        yield torch.from_numpy(block.mean(axis=1))


def _written(path: Path, rate: int) -> soundfile.SoundFile:
    subtype = {".wav": "FLOAT", ".flac": "PCM_24"}.get(path.suffix.lower())
    if subtype is None:
        raise DataError(f"{path}: give the output a name in .wav or .flac, or - for stdout")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return soundfile.SoundFile(path, "w", rate, 1, subtype)
    except (OSError, soundfile.LibsndfileError) as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def read_pcm(stream: BinaryIO, hop: int) -> Iterator[Tensor]:
    """Yield raw s16le mono samples of a pipe as [hop] float32, full scale 1, as they arrive."""
    while data := stream.read(2 * hop):
        whole = len(data) // 2 * 2  # a pipe that was cut may end within a sample
        if whole:
            yield torch.frombuffer(bytearray(data[:whole]), dtype=torch.int16) / 32768


def write_pcm(stream: BinaryIO, samples: Tensor) -> None:
    """Write [T] samples as raw s16le at once, clipped to full scale."""
    pcm = (samples * 32768).round().clamp(-32768, 32767).to(torch.int16)
    stream.write(pcm.numpy().tobytes())
    stream.flush()


def run_microphone(enhancer: OnlineEnhancer) -> LiveReport:
    """Enhance the microphone until Ctrl-C, and play it: wear headphones, or it feeds back.

    Hops that the sound card lost because they were not fetched in time count as missed.

    Args:
        enhancer: of one stream.

    Raises:
        MissingExtraError: the sounddevice package is not installed.
        ConfigError: no sound card, or one that does not take the model's rate.
    """
    try:
        sounddevice: Any = import_module("sounddevice")
    except (ImportError, OSError) as error:  # OSError: the package without PortAudio
        raise MissingExtraError(
            f"--device mic needs the sounddevice package ({error}): pip install 'diffbuf[mic]', "
            "and on Linux apt install libportaudio2"
        ) from None
    cfg = enhancer.model.cfg.audio
    hop = cfg.stft.hop_length
    lost = 0

    def recorded(card: Any) -> Iterator[Tensor]:
        nonlocal lost
        while True:
            block, overflowed = card.read(hop)
            lost += overflowed
            yield torch.from_numpy(block[:, 0].copy())

    try:
        with sounddevice.Stream(
            samplerate=cfg.sample_rate, blocksize=hop, channels=1, dtype="float32"
        ) as card:
            report = run_live(
                enhancer, recorded(card), lambda out: card.write(out.unsqueeze(1).numpy())
            )
    except sounddevice.PortAudioError as error:
        raise ConfigError(f"--device mic: the sound card cannot be used: {error}") from error
    return replace(report, missed=report.missed + lost)
