"""Enhance speech with the network in this folder, a stream at a time: no torch, no diffbuf.

    pip install numpy soundfile onnxruntime
    python run.py noisy.wav clean.wav

`Stream` is what a product needs: push any number of samples, get back those that are ready, as many
in all as went in. hop.onnx takes one frame through the network, start.onnx begins streams, and
stream.json says how frames are cut and compressed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile

TINY = np.float32(np.finfo(np.float32).tiny)


class Stream:
    """`batch` streams side by side, in one call of the network a hop."""

    def __init__(self, folder, batch=1, seed=0, threads=1):
        about = json.loads((Path(folder) / "stream.json").read_text())
        self.rate, self.n_fft, self.hop = about["sample_rate"], about["n_fft"], about["hop_length"]
        self.alpha, self.beta = about["alpha"], about["beta"]  # |c| becomes beta |c|^alpha
        self.buffer, self.delay = len(about["times"]), about["delay"]  # frames
        self.window = np.array(about["window"], np.float32)
        self.batch, self.seed = batch, seed
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # one is best beside other work on the same cores
        load = lambda name: onnxruntime.InferenceSession(  # noqa: E731
            Path(folder) / name, options, providers=["CPUExecutionProvider"]
        )
        self.start_graph, self.hop_graph = load("start.onnx"), load("hop.onnx")
        self.names = [given.name for given in self.hop_graph.get_inputs()]  # noisy, noise, state.0
        self.reset()

    def reset(self):
        """Forget the streams."""
        self.random = np.random.RandomState(self.seed)
        self.state = self.start_graph.run(None, {"noise": self.noise(self.buffer)})
        # Frames are centred: the first begins half a window before the stream.
        self.waiting = np.zeros((self.batch, self.n_fft // 2), np.float32)
        self.overlap = np.zeros((self.batch, self.n_fft), np.float32)  # of windowed output frames
        self.envelope = np.zeros(self.n_fft, np.float32)  # of their squared windows
        self.frames = self.taken = self.given = 0
        self.to_drop = self.n_fft // 2  # output from before the first sample

    def push(self, samples):
        """Take samples [batch, T] float32, full scale 1; give those that are ready, [batch, T']."""
        self.taken += samples.shape[1]
        samples = np.where(np.isfinite(samples), samples, 0).astype(np.float32)
        self.waiting = np.concatenate([self.waiting, samples], axis=1)
        ready = [np.zeros((self.batch, 0), np.float32)]
        while self.waiting.shape[1] >= self.n_fft:
            out = self._frame(self.waiting[:, : self.n_fft])
            self.waiting = self.waiting[:, self.hop :]
            if self.frames >= self.delay:  # before that, the buffer's own noise comes out
                ready.append(self._overlap_add(out))
        out = np.concatenate(ready, axis=1)
        dropped = min(self.to_drop, out.shape[1])
        self.to_drop -= dropped
        self.given += out.shape[1] - dropped
        return out[:, dropped:]

    def flush(self):
        """End the streams: give what is still inside."""
        missing, taken = self.taken - self.given, self.taken
        ready = [self.push(np.zeros((self.batch, -taken % self.hop + self.n_fft), np.float32))]
        while self.given < taken:
            ready.append(self.push(np.zeros((self.batch, self.hop), np.float32)))
        self.reset()
        return np.concatenate(ready, axis=1)[:, :missing]

    def _frame(self, frame):
        """One noisy frame [batch, n_fft] to the clean one that comes out for it."""
        spectrum = np.fft.rfft(frame * self.window).astype(np.complex64)
        spectrum *= self.beta * np.maximum(np.abs(spectrum), TINY) ** (self.alpha - 1)
        noisy = spectrum.view(np.float32).reshape(*spectrum.shape, 2)
        given = [noisy, self.noise(self.buffer + 1), *self.state]
        clean, *self.state = self.hop_graph.run(None, dict(zip(self.names, given)))  # noqa: B905
        clean = clean.view(np.complex64)[..., 0]
        clean *= np.maximum(np.abs(clean), TINY) ** (1 / self.alpha - 1)
        self.frames += 1
        return np.fft.irfft(clean * self.beta ** (-1 / self.alpha), self.n_fft).astype(np.float32)

    def _overlap_add(self, frame):
        """Add a frame; give the hop of samples that no later frame changes."""
        self.overlap += frame * self.window
        self.envelope += self.window**2
        scale = np.where(self.envelope > 1e-8, self.envelope, 1)[: self.hop]
        done = self.overlap[:, : self.hop] / scale
        self.overlap = np.pad(self.overlap[:, self.hop :], ((0, 0), (0, self.hop)))
        self.envelope = np.pad(self.envelope[self.hop :], (0, self.hop))
        return done

    def noise(self, frames):
        """CN(0, 1) noise [batch, F, frames, 2], the numbers that torch.randn draws of this seed.

        Any Gaussian noise does as well; with this one the output is that of `diffbuf stream`.
        """
        shape = (self.batch, self.n_fft // 2 + 1, frames, 2)
        count = int(np.prod(shape))

        def normal(n):  # Box and Muller 1958, eight pairs at a time
            bits = np.frombuffer(self.random.bytes(4 * n), "<u4") & 0xFFFFFF
            first, second = (bits[: n // 16 * 16] * np.float32(2**-24)).reshape(-1, 2, 8).swapaxes(0, 1)
            radius, angle = np.sqrt(-np.log(1 - first)), np.float32(2 * np.pi) * second
            return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()

        drawn = normal(count)
        if count % 16:
            drawn = np.concatenate([drawn[: count - 16], normal(16)])
        return drawn.reshape(shape).astype(np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="audio file of the model's sample rate; averaged to mono")
    parser.add_argument("output", help=".wav or .flac file")
    parser.add_argument("--seed", type=int, default=0, help="of the diffusion noise")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    stream = Stream(Path(__file__).parent, seed=args.seed, threads=args.threads)
    audio, rate = soundfile.read(args.source, dtype="float32", always_2d=True)
    if rate != stream.rate:
        sys.exit(f"{args.source} is at {rate} Hz and the model at {stream.rate} Hz: resample it")
    mono, ready, hops = audio.mean(axis=1)[None], [], []
    for begin in range(0, mono.shape[1], stream.hop):
        begun = time.perf_counter()
        ready.append(stream.push(mono[:, begin : begin + stream.hop]))
        hops.append(time.perf_counter() - begun)
    out = np.concatenate([*ready, stream.flush()], axis=1)[0]
    wav = args.output.lower().endswith(".wav")
    soundfile.write(args.output, out, rate, subtype="FLOAT" if wav else None)
    median, limit = np.median(hops), stream.hop / rate
    print(f"real-time factor {median / limit:.3f} (median), worst hop {max(hops) / limit:.3f}")
