"""How much memory training takes: counted from what autograd keeps, not guessed.

A step holds weights, gradients, optimizer state and averaged weights, whatever the batch; and what
the forward pass saves for the backward pass, which grows with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from diffbuf_lib.config import Config
from diffbuf_lib.memory import SavedBytes, saved_bytes
from diffbuf_lib.registry import OPTIMIZERS

# Beside what is saved, a step at its peak holds gradients of activations and convolution scratch:
# this many times the largest saved tensor, and something whatever the batch. Both are fitted to the
# peak memory of ncsnpp's training steps on a CPU (16 and 96 channels, batches of 2 to 16), which
# the estimate meets within 6 %.
_WORKING = 7
_OVERHEAD = 128 * 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step as a function of the batch size.

    Attributes:
        fixed: weights, buffers, gradients, optimizer state, averaged weights, overhead.
        base: saved by a forward pass whatever the batch.
        per_clip: saved for each clip, and the working memory of each.
    """

    fixed: int
    base: int
    per_clip: int

    def total(self, batch_size: int) -> int:
        """Return bytes of a step of `batch_size` clips."""
        return self.fixed + self.base + batch_size * self.per_clip

    def largest_batch(self, free: int) -> int:
        """Return the largest batch size that fits into `free` bytes; 0 if not even one clip."""
        return max(0, (free - self.fixed - self.base) // max(1, self.per_clip))


def estimate(
    model: nn.Module, optimizer: str, saved: SavedBytes, two: SavedBytes | None = None
) -> MemoryEstimate:
    """Put an estimate together.

    Args:
        model: weights and buffers.
        optimizer: `training.optimizer`.
        saved: of a forward pass on one clip.
        two: of one on two clips; None takes everything to grow with the batch.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    # The weights themselves, their gradients, the average and the optimizer's states.
    fixed = weights * (3 + OPTIMIZERS[optimizer].facts["states"]) + 2 * buffers + _OVERHEAD
    per_clip = saved.total if two is None else max(0, two.total - saved.total)
    return MemoryEstimate(
        fixed, max(0, saved.total - per_clip), per_clip + _WORKING * saved.largest
    )


def estimate_step(cfg: Config, model: nn.Module | None = None) -> MemoryEstimate:
    """Estimate a training step: from forward passes of a model, or without one from shapes alone.

    Args:
        cfg: the config.
        model: runs on one and on two clips of noise, in the precision of the config.
    """
    if model is None:
        return network_estimate(cfg)
    device, training = next(model.parameters()).device, cfg.training
    half = torch.bfloat16 if training.amp_dtype == "bf16" else torch.float16
    mixed = training.use_amp and (device.type == "cuda" or half is torch.bfloat16)
    kept = []
    for clips in (1, 2):
        mix, target = 0.1 * torch.randn(2, clips, 1, cfg.audio.chunk_size, device=device)
        with saved_bytes(model) as saved, torch.autocast(device.type, half, enabled=mixed):
            loss = model(mix, target)
        del loss
        kept.append(saved)
    return estimate(model, training.optimizer, *kept)


def network_estimate(cfg: Config) -> MemoryEstimate:
    """Estimate from shapes alone: nothing is computed and no memory is taken.

    Of the network in float32, which is nearly all of the model. The first call imports torch's
    shape rules, which takes some seconds.
    """
    from diffbuf_lib.networks import make_network

    with torch.device("meta"):
        network = make_network(cfg.model)
        x = torch.empty(1, 4, cfg.audio.stft.n_fft // 2 + 1, cfg.audio.num_frames)
        t = torch.empty(1, cfg.diffusion_buffer.buffer_size)
        with saved_bytes(network) as saved:
            network(x, t)
    return estimate(network, cfg.training.optimizer, saved)
