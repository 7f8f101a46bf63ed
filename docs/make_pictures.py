"""Make the README's picture from the demo set: `python docs/make_pictures.py` after `make demo`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffbuf_lib import DiffusionBufferModel, DNLMDataset, load_config
from diffbuf_lib.figures import to_pixels


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
    hop, top = cfg.audio.stft.hop_length / cfg.audio.sample_rate, cfg.audio.sample_rate / 2000
    figure = Figure(figsize=(11, 5.2), dpi=80, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    titles = ("noisy Y", "clean S", f"perturbed input V: the last {Kb} frames are the buffer")
    for axes, name, spec in zip(panels.flat, titles, (trace.Y, trace.S, trace.V), strict=False):
        level = 20 * torch.log10(spec[0].abs() + 1e-3).numpy()
        axes.imshow(
            level, origin="lower", aspect="auto", extent=(0, K * hop, 0, top), cmap="magma",
            vmin=-50, vmax=0,
        )  # fmt: skip
        axes.axvline((K - Kb) * hop, color="white", linestyle="--", linewidth=1)
        axes.set_title(name, loc="left")
        axes.set_ylabel("frequency (kHz)")
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
