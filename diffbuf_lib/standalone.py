"""Enhance speech with the network in this folder: no torch, no diffbuf.

    pip install numpy soundfile onnxruntime && python run.py noisy.wav clean.wav

Use `Stream` in your product. hop.onnx runs the network on one frame, start.bin is the initial
state of a stream, stream.json says how frames are cut and compressed.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile

SMALLEST = np.finfo(np.float32).tiny


class Stream:
    """Streams side by side, with one network call per hop: as many samples come out as go in."""

    def __init__(self, folder: str | Path, batch: int = 1, seed: int = 0, threads: int = 1) -> None:
        about = json.loads((Path(folder) / "stream.json").read_text())
        self.rate, self.n_fft, self.hop = about["sample_rate"], about["n_fft"], about["hop_length"]
        self.alpha, self.beta = about["alpha"], about["beta"]  # |c| becomes beta |c|^alpha
        self.sigma, self.delay = np.array(about["start_sigma"], np.float32), about["delay"]
        self.window, self.batch, self.seed = np.array(about["window"], np.float32), batch, seed
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # one is best next to other work
        self.graph = onnxruntime.InferenceSession(Path(folder) / "hop.onnx", options)
        self.names = [each.name for each in self.graph.get_inputs()]  # noisy, noise, state.0, ...
        shapes = [each.shape[1:] for each in self.graph.get_inputs()[2:]]
        flat = np.fromfile(Path(folder) / "start.bin", np.float32)
        pieces = np.split(flat, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
        self.start = [piece.reshape(1, *shape) for piece, shape in zip(pieces, shapes, strict=True)]
        self.reset()

    def reset(self) -> None:
        """Start all streams over."""
        self.random = np.random.RandomState(self.seed)
        self.state = [np.repeat(one, self.batch, axis=0) for one in self.start]
        B = len(self.sigma)  # frames of the buffer, which begin as noise
        self.state[0][:, :, -B:] = self.sigma[:, None] * self.noise(B)
        self.waiting = np.zeros((self.batch, self.n_fft // 2), np.float32)  # frames are centred
        self.overlap = np.zeros((self.batch, self.n_fft), np.float32)  # of windowed output frames
        self.envelope = np.zeros(self.n_fft, np.float32)  # of their squared windows
        self.frames, self.taken, self.given = 0, 0, -(self.n_fft // 2)  # below 0: dropped

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take samples [batch, T], full scale 1; return those that are ready, [batch, T']."""
        self.taken += samples.shape[1]
        samples = np.where(np.isfinite(samples), samples, 0).astype(np.float32)
        self.waiting = np.concatenate([self.waiting, samples], axis=1)
        ready = [np.zeros((self.batch, 0), np.float32)]
        while self.waiting.shape[1] >= self.n_fft:
            clean = self.enhance(self.waiting[:, : self.n_fft])
            self.waiting = self.waiting[:, self.hop :]
            if self.frames >= self.delay:  # until then, the buffer's initial noise leaves it
                ready.append(self.overlap_add(clean))
        out = np.concatenate(ready, axis=1)
        early, self.given = max(-self.given, 0), self.given + out.shape[1]
        return out[:, early:]

    def flush(self) -> np.ndarray:
        """End the streams: return what is still inside."""
        taken, given = self.taken, max(self.given, 0)
        ready = [self.push(np.zeros((self.batch, -taken % self.hop + self.n_fft), np.float32))]
        while self.given < taken:
            ready.append(self.push(np.zeros((self.batch, self.hop), np.float32)))
        self.reset()
        return np.concatenate(ready, axis=1)[:, : taken - given]

    def enhance(self, frame: np.ndarray) -> np.ndarray:
        """Take the newest frame [batch, n_fft]; return the clean one that leaves the buffer."""
        c = np.fft.rfft(frame * self.window).astype(np.complex64)
        c *= self.beta * np.maximum(np.abs(c), SMALLEST) ** (self.alpha - 1)
        noisy, noise = c.view(np.float32).reshape(*c.shape, 2), self.noise(len(self.sigma) + 1)
        given = [noisy, noise, *self.state]
        out, *self.state = self.graph.run(None, dict(zip(self.names, given, strict=True)))
        c = out.view(np.complex64)[..., 0] / self.beta
        c *= np.maximum(np.abs(c), SMALLEST) ** (1 / self.alpha - 1)
        self.frames += 1
        return np.fft.irfft(c, self.n_fft).astype(np.float32)

    def overlap_add(self, frame: np.ndarray) -> np.ndarray:
        """Add a frame; return the hop of samples that no later frame changes."""
        self.overlap += frame * self.window
        self.envelope += self.window**2
        done = self.overlap / np.where(self.envelope > 1e-8, self.envelope, 1)
        self.overlap = np.pad(self.overlap[:, self.hop :], ((0, 0), (0, self.hop)))
        self.envelope = np.pad(self.envelope[self.hop :], (0, self.hop))
        return done[:, : self.hop]

    def noise(self, frames: int) -> np.ndarray:
        """Draw CN(0, 1), [batch, F, frames, 2]: what torch and diffbuf draw with this seed."""

        def draw(n: int) -> np.ndarray:  # Box and Muller 1958, 16 numbers of variance 1/2 at a time
            bits = np.frombuffer(self.random.bytes(4 * n), "<u4") & 0xFFFFFF
            u = (bits[: n // 16 * 16] / 2**24).astype(np.float32).reshape(-1, 2, 8)
            radius, angle = np.sqrt(-np.log(1 - u[:, 0])), np.float32(2 * np.pi) * u[:, 1]
            z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
            return z if n % 16 == 0 else np.concatenate([z[: n - 16], draw(16)])

        bins = self.n_fft // 2 + 1
        return draw(self.batch * bins * frames * 2).reshape(self.batch, bins, frames, 2)


if __name__ == "__main__":
    source, output = sys.argv[1:]
    stream, (audio, rate) = Stream(Path(__file__).parent), soundfile.read(source, always_2d=True)
    if rate != stream.rate:
        sys.exit(f"{source} is at {rate} Hz and the model at {stream.rate} Hz: resample it")
    begun, mono = time.perf_counter(), audio.mean(axis=1)[None]
    ready = [stream.push(mono[:, i : i + stream.hop]) for i in range(0, len(audio), stream.hop)]
    out = np.concatenate([*ready, stream.flush()], axis=1)[0]
    print(f"real-time factor {(time.perf_counter() - begun) * rate / len(audio):.3f}")
    soundfile.write(output, out, rate, subtype="FLOAT" if output.endswith(".wav") else None)
