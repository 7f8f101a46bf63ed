"""Enhance speech with the network in this folder: no torch, no diffbuf.

    pip install numpy soundfile onnxruntime
    python run.py noisy.wav clean.wav

`Stream` is for your product. hop.onnx takes one frame through the network, start.bin is the state
of a stream that begins, stream.json says how frames are cut and compressed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import soundfile

Array = np.ndarray[Any, np.dtype[np.float32]]
SMALLEST = np.finfo(np.float32).tiny


class Stream:
    """Streams side by side, in one call of the network a hop: as many samples out as in."""

    def __init__(self, folder: str | Path, batch: int = 1, seed: int = 0, threads: int = 1) -> None:
        about = json.loads((Path(folder) / "stream.json").read_text())
        self.rate, self.n_fft, self.hop = about["sample_rate"], about["n_fft"], about["hop_length"]
        self.alpha, self.beta = about["alpha"], about["beta"]  # |c| becomes beta |c|^alpha
        self.sigma, self.delay = np.float32(about["start_sigma"]), about["delay"]
        self.window = np.float32(about["window"])
        self.batch, self.seed = batch, seed
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # one does best beside other work
        self.graph = onnxruntime.InferenceSession(
            Path(folder) / "hop.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.names = [each.name for each in self.graph.get_inputs()]  # noisy, noise, state.0, ...
        shapes = [each.shape[1:] for each in self.graph.get_inputs()[2:]]
        flat = np.fromfile(Path(folder) / "start.bin", np.float32)
        pieces = np.split(flat, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
        self.start = [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        self.reset()

    def reset(self) -> None:
        """Forget the streams."""
        self.random = np.random.RandomState(self.seed)
        self.state = [np.repeat(one[None], self.batch, axis=0) for one in self.start]
        buffer = len(self.sigma)  # frames, which begin as noise
        self.state[0][:, :, -buffer:] = self.sigma[:, None] * self.noise(buffer)
        # Frames are centred: the first begins half a window before the stream.
        self.waiting = np.zeros((self.batch, self.n_fft // 2), np.float32)
        self.overlap = np.zeros((self.batch, self.n_fft), np.float32)  # of windowed output frames
        self.envelope = np.zeros(self.n_fft, np.float32)  # of their squared windows
        self.frames, self.taken, self.given = 0, 0, -(self.n_fft // 2)  # below 0: left out

    def push(self, samples: Array) -> Array:
        """Take samples [batch, T], full scale 1; give those that are ready, [batch, T']."""
        self.taken += samples.shape[1]
        samples = np.where(np.isfinite(samples), samples, 0).astype(np.float32)
        self.waiting = np.concatenate([self.waiting, samples], axis=1)
        out = np.zeros((self.batch, 0), np.float32)
        while self.waiting.shape[1] >= self.n_fft:
            clean = self.enhance(self.waiting[:, : self.n_fft])
            self.waiting = self.waiting[:, self.hop :]
            if self.frames >= self.delay:  # before, the buffer's own noise leaves it
                out = np.concatenate([out, self.overlap_add(clean)], axis=1)
        dropped = min(max(-self.given, 0), out.shape[1])
        self.given += out.shape[1]
        return out[:, dropped:]

    def flush(self) -> Array:
        """End the streams: give what is still inside."""
        taken, missing = self.taken, self.taken - max(self.given, 0)
        out = self.push(np.zeros((self.batch, -taken % self.hop + self.n_fft), np.float32))
        while out.shape[1] < missing:
            more = self.push(np.zeros((self.batch, self.hop), np.float32))
            out = np.concatenate([out, more], axis=1)
        self.reset()
        return out[:, :missing]

    def enhance(self, frame: Array) -> Array:
        """Take the newest frame [batch, n_fft]; give the clean one that leaves the buffer."""
        spectrum = np.fft.rfft(frame * self.window).astype(np.complex64)
        spectrum *= self.beta * np.maximum(np.abs(spectrum), SMALLEST) ** (self.alpha - 1)
        noisy = spectrum.view(np.float32).reshape(*spectrum.shape, 2)
        given = [noisy, self.noise(len(self.sigma) + 1), *self.state]
        out, *self.state = self.graph.run(None, dict(zip(self.names, given, strict=True)))
        clean = out.view(np.complex64)[..., 0] * self.beta ** (-1 / self.alpha)
        clean *= np.maximum(np.abs(out.view(np.complex64)[..., 0]), SMALLEST) ** (1 / self.alpha - 1)
        self.frames += 1
        return np.fft.irfft(clean, self.n_fft).astype(np.float32)

    def overlap_add(self, frame: Array) -> Array:
        """Add a frame; give the hop of samples that no later frame changes."""
        self.overlap += frame * self.window
        self.envelope += self.window**2
        done = self.overlap / np.where(self.envelope > 1e-8, self.envelope, 1)
        self.overlap = np.pad(self.overlap[:, self.hop :], ((0, 0), (0, self.hop)))
        self.envelope = np.pad(self.envelope[self.hop :], (0, self.hop))
        return done[:, : self.hop]

    def noise(self, frames: int) -> Array:
        """Draw CN(0, 1) [batch, F, frames, 2]: of this seed what torch, and so diffbuf, draws."""
        shape = (self.batch, self.n_fft // 2 + 1, frames, 2)
        count = int(np.prod(shape))
        drawn = self.normal(count)
        if count % 16:  # torch draws the last 16 again
            drawn = np.concatenate([drawn[: count - 16], self.normal(16)])
        return drawn.reshape(shape)

    def normal(self, count: int) -> Array:
        """Draw 16 by 16 with variance 1/2 (Box and Muller 1958), if 16 divides count."""
        bits = np.frombuffer(self.random.bytes(4 * count), "<u4") & 0xFFFFFF
        u = (bits[: count // 16 * 16] * np.float32(2**-24)).reshape(-1, 2, 8)
        radius, angle = np.sqrt(-np.log(1 - u[:, :1])), np.float32(2 * np.pi) * u[:, 1:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


if __name__ == "__main__":
    source, output = sys.argv[1:3]
    stream = Stream(Path(__file__).parent)
    audio, rate = soundfile.read(source, dtype="float32", always_2d=True)
    if rate != stream.rate:
        sys.exit(f"{source} is at {rate} Hz and the model at {stream.rate} Hz: resample it")
    mono, out, seconds = audio.mean(axis=1)[None], [], []
    for begin in range(0, mono.shape[1], stream.hop):
        begun = time.perf_counter()
        out.append(stream.push(mono[:, begin : begin + stream.hop]))
        seconds.append(time.perf_counter() - begun)
    soundfile.write(output, np.concatenate([*out, stream.flush()], axis=1)[0], rate)
    limit = stream.hop / rate
    print(f"real-time factor {np.median(seconds) / limit:.3f}, worst {max(seconds) / limit:.3f}")
