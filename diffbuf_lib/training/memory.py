"""Memory of a training step: what is free, what a step takes, and the largest batch that fits.

A step holds weights, gradients, optimizer state and averaged weights, whatever the batch; and what
the forward pass saves for the backward pass, which grows with the batch. That is counted from what
autograd keeps, not guessed.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffbuf_lib.config import Config
from diffbuf_lib.errors import OutOfMemoryError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.networks import make_network
from diffbuf_lib.registry import OPTIMIZERS
from diffbuf_lib.training.feed import Batch, ClipSource, Stream, example_generators, seed_everything
from diffbuf_lib.training.signals import isolated
from diffbuf_lib.training.step import Engine, make_accelerator

# Besides what is saved, a step at its peak holds gradients of activations and convolution scratch:
# this many times the largest saved tensor, plus a constant. Both are fitted to the peak memory of
# ncsnpp's training steps on a CPU (16 and 96 channels, batches of 2 to 16), which the estimate
# matches within 6 %.
_WORKING = 7
_OVERHEAD = 128 * 2**20
_SIGNS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "ALLOC_FAILED")


class MemoryEstimate(NamedTuple):
    """Bytes of a training step as a function of the batch size."""

    fixed: int  # weights, buffers, gradients, optimizer state, averaged weights, overhead
    per_clip: int  # saved for each clip, and its working memory

    def total(self, batch_size: int) -> int:
        """Return bytes of a step of `batch_size` clips."""
        return self.fixed + batch_size * self.per_clip

    def largest_batch(self, free: int) -> int:
        """Return the largest batch size that fits into `free` bytes; 0 if not even one clip."""
        return max(0, (free - self.fixed) // self.per_clip)


def estimate_step(cfg: Config) -> MemoryEstimate:
    """Estimate a step from the shapes of the network in float32, which is nearly all of the model.

    Nothing is computed. The first call imports torch's shape rules, which takes some seconds.
    """
    with torch.device("meta"):
        network = make_network(cfg.model)
        x = torch.empty(1, 4, cfg.audio.stft.n_fft // 2 + 1, cfg.audio.num_frames)
        with saved_bytes(network) as saved:
            network(x, torch.empty(1, cfg.diffusion_buffer.buffer_size))
    return step_memory(network, cfg.training.optimizer, saved)


def step_memory(model: nn.Module, optimizer: str, one_clip: SavedBytes) -> MemoryEstimate:
    """Add up the memory of a step from what autograd keeps for one clip."""
    # The weights themselves, their gradients, the average and the optimizer's states.
    copies = 3 + OPTIMIZERS[optimizer].facts.get("states", 2)
    fixed = copies * _size(model.parameters()) + 2 * _size(model.buffers()) + _OVERHEAD
    return MemoryEstimate(fixed, one_clip.total + _WORKING * one_clip.largest)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class SavedBytes:
    """What autograd kept: bytes of distinct storages, without the weights."""

    total: int = 0
    largest: int = 0  # of one storage


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves in a block whose result is kept, without the model's tensors."""

    def identity(tensor: Tensor) -> int:  # the same for all tensors on one storage
        return int(tensor.untyped_storage()._cdata)  # a data_ptr is 0 without data

    seen = {identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # an identity is unique only as long as the storage lives
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        if identity(tensor) not in seen:
            seen.add(identity(tensor))
            kept.append(tensor.detach())
            size = tensor.untyped_storage().nbytes()
            saved.total, saved.largest = saved.total + size, max(saved.largest, size)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    kept.clear()


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the GPU, or in this machine or container."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # type: ignore[import-untyped]

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # a container's limit (control groups, version 2)
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(free, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the CPU has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def explain_out_of_memory(cfg: Config, device: torch.device, size: int, asked: str = "") -> str:
    """Say how much torch was asked for, what would fit, and which keys to lower."""
    found = re.search(r"tried to allocate [\d.]+ \w+", asked, re.IGNORECASE)
    amount = f" ({found[0].lower()})" if found else ""
    free = free_memory(device)
    try:
        fitting = min(estimate_step(cfg).largest_batch(free), size - 1)
    except Exception:  # the first error counts
        fitting = 0
    fits = f"about {fitting} would fit" if fitting else "not even one clip would fit"
    return (
        f"out of memory on {device} in a step of {size} clips of {cfg.audio.chunk_size} samples"
        f"{amount}; {fits} into the {free / 2**30:.3g} GiB that are free. Lower "
        f"training.batch_size {cfg.training.batch_size} (--find_batch_size finds one that fits; "
        "training.accumulation_steps makes up for it), model.base_channels or audio.chunk_size"
    )


def find_batch_size(cfg: Config, train_set: ClipSource, device: str = "auto") -> int:
    """Return the largest batch size with which two training steps run here.

    On a GPU any size up to that of the training set is tried: doubled while it fits, halved until
    it does, then narrowed to within an eighth. On a CPU, where larger batches are no faster
    and the system may kill a process that takes too much, it is `training.batch_size` or what the
    estimate allows. OutOfMemoryError if not even one clip fits.
    """
    accelerator = make_accelerator(cfg.training, device)
    where, first = accelerator.device, min(cfg.training.batch_size, len(train_set))
    if where.type == "cuda":
        clip = train_set[0]

        def fits(size: int) -> bool:
            try:
                return _fits(cfg, accelerator, clip, size)
            finally:
                gc.collect()
                torch.cuda.empty_cache()

        size = largest(fits, first, len(train_set))
    else:
        size = min(first, estimate_step(cfg).largest_batch(free_memory(where)))
    if not size:
        raise OutOfMemoryError(explain_out_of_memory(cfg, where, 1))
    return size


# Accelerate's `find_executable_batch_size` never grows the batch, shrinks it by a tenth at a time,
# and does not handle a MemoryError.
def largest(fits: Callable[[int], bool], first: int, ceiling: int) -> int | None:
    """Return the largest size up to `ceiling` that fits, within an eighth; None if 1 does not."""
    size, too_large = first, ceiling + 1
    while not fits(size):
        if size == 1:
            return None
        size, too_large = size // 2, size
    while too_large > ceiling and size < ceiling:
        larger = min(2 * size, ceiling)
        size, too_large = (larger, too_large) if fits(larger) else (size, larger)
    while too_large <= ceiling and too_large - size > max(1, size // 8):
        middle = (size + too_large) // 2
        size, too_large = (middle, too_large) if fits(middle) else (size, middle)
    return size


def _fits(cfg: Config, accelerator: Accelerator, clip: tuple[Tensor, Tensor], size: int) -> bool:
    """Return whether two steps fit; the optimizer allocates its memory in the first one."""
    device, seed = accelerator.device, cfg.training.seed
    try:
        with isolated(device, deterministic=cfg.training.deterministic):
            seed_everything(seed, Stream.WEIGHTS)
            engine = Engine(cfg, DiffusionBufferModel(cfg), accelerator, total_steps=2)
            mix, target = (w.expand(size, *w.shape).to(device).contiguous() for w in clip)
            for _ in range(2):
                keys = [(0, i) for i in range(size)]
                generators = example_generators(keys, seed, Stream.EXAMPLE, device)
                engine.step([Batch(mix, target, generators)])
    except Exception as error:
        if is_out_of_memory(error):
            return False
        raise
    return True
