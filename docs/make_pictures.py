"""Make the README's picture from the demo set: `python docs/make_pictures.py` after `make demo`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffbuf_lib import DiffusionBufferModel, DNLMDataset, load_config
from diffbuf_lib.figures import decibels, draw_level, to_pixels


def main() -> None:
    """Draw Y, S, V and the times of one clip."""
    cfg = load_config(
        "configs/debug.yaml", ["diffusion_buffer.buffer_size=20", "diffusion_buffer.num_frames=63"]
    )
    dataset = DNLMDataset("data/DN-LM-demo/train", training=False)
    torch.manual_seed(0)
    mix, target = dataset[3]
    trace = DiffusionBufferModel(cfg).trace(
        mix[None], target[None], torch.Generator().manual_seed(0)
    )
    K, Kb = trace.Y.shape[-1], trace.t.shape[-1]
    rate, stft = cfg.audio.sample_rate, cfg.audio.stft
    hop = stft.hop_length / rate
    figure = Figure(figsize=(11, 5.2), dpi=80, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    titles = ("noisy Y", "clean S", f"perturbed input V: the last {Kb} frames are the buffer")
    for axes, title, spec in zip(panels.flat, titles, (trace.Y, trace.S, trace.V), strict=False):
        draw_level(axes, decibels(spec[0]), rate, stft, vmin=-50, vmax=0)
        axes.axvline((K - Kb - 0.5) * hop, color="white", linestyle="--", linewidth=1)
        axes.set_title(title, loc="left")
    axes = panels[1, 1]
    frames = np.arange(K) * hop
    axes.step(frames, np.pad(trace.t[0].numpy(), (K - Kb, 0)), where="post", label="t")
    axes.step(frames, np.pad(trace.sigma[0].numpy(), (K - Kb, 0)), where="post", label="sigma(t)")
    axes.set_title("diffusion time and noise of every frame", loc="left")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("time (s)")
    picture = Image.fromarray(to_pixels(figure)).quantize(128)
    picture.save(Path(__file__).parent / "buffer.png", optimize=True)


if __name__ == "__main__":
    main()
