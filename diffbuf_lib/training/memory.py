"""Memory of a training step: what is free, what a step takes, and the largest batch that fits.

A step holds weights, gradients, optimizer state and averaged weights, whatever the batch; and what
the forward pass saves for the backward pass, which grows with the batch. That is counted from what
autograd keeps, not guessed.

`python -m diffbuf_lib.training.memory FOLDER SIZE` tries a batch in a process of its own.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.config import Config, build_config
from diffbuf_lib.errors import DataError, DiffbufError, OutOfMemoryError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.networks import make_network
from diffbuf_lib.registry import OPTIMIZERS
from diffbuf_lib.training.checkpoint import load_tensors
from diffbuf_lib.training.feed import Batch, ClipSource, Stream, example_generators, seed_everything
from diffbuf_lib.training.signals import isolated
from diffbuf_lib.training.step import Engine, make_accelerator

# Beside what is saved, a step at its peak holds gradients of activations and convolution scratch:
# this many times the largest saved tensor, and something whatever the batch. Both are fitted to the
# peak memory of ncsnpp's training steps on a CPU (16 and 96 channels, batches of 2 to 16), which
# the estimate meets within 6 %.
_WORKING = 7
_OVERHEAD = 128 * 2**20
_SIGNS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "ALLOC_FAILED")
TOO_LARGE = 3
"""Exit status of a trial that ran out of memory in an orderly way."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step as a function of the batch size."""

    fixed: int  # weights, buffers, gradients, optimizer state, averaged weights, overhead
    base: int  # saved by a forward pass whatever the batch
    per_clip: int  # saved for each clip, and the working memory of each

    def total(self, batch_size: int) -> int:
        """Return bytes of a step of `batch_size` clips."""
        return self.fixed + self.base + batch_size * self.per_clip

    def largest_batch(self, free: int) -> int:
        """Return the largest batch size that fits into `free` bytes; 0 if not even one clip."""
        return max(0, (free - self.fixed - self.base) // max(1, self.per_clip))


def estimate_step(cfg: Config, model: nn.Module | None = None) -> MemoryEstimate:
    """Estimate the memory of a training step.

    Args:
        cfg: the config.
        model: runs forward on one and on two clips, in the config's precision; None estimates
            from the shapes of the network alone, see `network_estimate`.
    """
    if model is None:
        return network_estimate(cfg)
    device, training = next(model.parameters()).device, cfg.training
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[training.amp_dtype]
    mixed = training.use_amp and (device.type == "cuda" or dtype == torch.bfloat16)
    saved = []
    for clips in (1, 2):
        mix = 0.1 * torch.ones(clips, 1, cfg.audio.chunk_size, device=device)
        with (
            isolated(device, deterministic=False),
            saved_bytes(model) as kept,
            torch.autocast(device.type, dtype, enabled=mixed),
        ):
            loss = model(mix, mix)
        del loss
        saved.append(kept)
    return _estimate(model, training.optimizer, *saved)


def network_estimate(cfg: Config) -> MemoryEstimate:
    """Estimate from shapes alone: nothing is computed and no memory is taken.

    Of the network in float32, which is nearly all of the model. The first call imports torch's
    shape rules, which takes some seconds.
    """
    with torch.device("meta"):
        network = make_network(cfg.model)
        x = torch.empty(1, 4, cfg.audio.stft.n_fft // 2 + 1, cfg.audio.num_frames)
        t = torch.empty(1, cfg.diffusion_buffer.buffer_size)
        with saved_bytes(network) as saved:
            network(x, t)
    return _estimate(network, cfg.training.optimizer, saved)


def _estimate(
    model: nn.Module, optimizer: str, one: SavedBytes, two: SavedBytes | None = None
) -> MemoryEstimate:
    """Combine what one clip saves, and two; None: everything grows with the batch."""
    weights, buffers = _size(model.parameters()), _size(model.buffers())
    # The weights themselves, their gradients, the average and the optimizer's states.
    copies = 3 + OPTIMIZERS[optimizer].facts.get("states", 2)
    fixed = weights * copies + 2 * buffers + _OVERHEAD
    per_clip = one.total if two is None else max(0, two.total - one.total)
    return MemoryEstimate(fixed, max(0, one.total - per_clip), per_clip + _WORKING * one.largest)


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class SavedBytes:
    """What autograd kept: bytes of distinct storages, without the weights."""

    total: int = 0
    largest: int = 0  # of one storage


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves in a block; keep its result until the end of the block.

    Args:
        model: its parameters and buffers are not counted.
    """

    def identity(tensor: Tensor) -> int:  # the same for all tensors on one storage
        return int(tensor.untyped_storage()._cdata)  # a data_ptr is 0 without data

    seen = {identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # an identity is one only as long as the storage lives
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        if identity(tensor) not in seen:
            seen.add(identity(tensor))
            kept.append(tensor.detach())
            size = tensor.untyped_storage().nbytes()
            saved.total += size
            saved.largest = max(saved.largest, size)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    kept.clear()


def free_memory(device: torch.device) -> int:
    """Return bytes that may still be taken: of the GPU, or of this machine, container, process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # type: ignore[import-untyped]

    limits = [int(psutil.virtual_memory().available)]
    with suppress(OSError, ValueError):  # a container's limit (control groups, version 2)
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        limits.append(int((group / "memory.max").read_text()) - used)
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft - taken_memory())
    return max(min(limits), 0)


def taken_memory() -> int:
    """Return the bytes of data that this process has (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = [line for line in lines if line.startswith("VmData:")]
    return 1024 * int(sizes[0].split()[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the CPU has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def explain_out_of_memory(error: Exception, cfg: Config, engine: Engine, batch: Batch) -> str:
    """Say what was asked for, what would fit, and which keys to lower.

    The error's traceback must not hold the step's tensors any more; gradients are freed.
    """
    device, size = engine.accelerator.device, len(batch.mix)
    engine.optimizer.zero_grad()
    asked = "more was asked for than is there"
    if found := re.search(r"[Tt]ried to allocate ([\d.]+) ([KMG]iB|bytes)", str(error)):
        amount = _readable(float(found[1])) if found[2] == "bytes" else f"{found[1]} {found[2]}"
        asked = f"{amount} more were asked for"
    free = free_memory(device)
    held = 2 * _size(engine.model.parameters()) + 2 * _size(engine.model.buffers())
    try:
        fitting = min(estimate_step(cfg).largest_batch(free + held), size - 1)
    except Exception:  # the first error counts
        fitting = 0
    fits = f"about {fitting} would fit" if fitting else "not even one clip would fit"
    return (
        f"out of memory on {device}: {asked} in a step of {size} clips of "
        f"{batch.mix.shape[-1]} samples; {fits} into the {_readable(free)} that are free. "
        f" Lower training.batch_size (now {cfg.training.batch_size}; --find_batch_size finds "
        "one that fits, and training.accumulation_steps makes up for it) or model.base_channels "
        f"(now {cfg.model.base_channels})"
    )


def _readable(count: float) -> str:
    """Return 5368709120 bytes as "5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def find_batch_size(cfg: Config, train_set: ClipSource, device: str = "auto") -> int:
    """Return the largest batch of which two steps can be trained here.

    On a GPU any size up to that of the training set is tried: doubled while it fits, halved until
    it does, then narrowed to within an eighth. On a CPU sizes above `training.batch_size` are not
    tried, since they make nothing faster, and every trial is a process of its own: where memory
    ends, the system or some C library may end the process rather than raise. (That, and growing,
    is what accelerate's `find_executable_batch_size` does not do.)

    Args:
        cfg: the config.
        train_set: its first clip is repeated.
        device: as in `train`.

    Raises:
        OutOfMemoryError: not even one clip fits.
        DataError: an empty training set.
    """
    if len(train_set) < 1:
        raise DataError("the training set holds no clip: check the path of the training data")
    mix, target = train_set[0]
    accelerator = make_accelerator(cfg.training, device)
    on_gpu = accelerator.device.type == "cuda"
    ceiling = len(train_set) if on_gpu else min(cfg.training.batch_size, len(train_set))

    def fits(size: int) -> bool:
        if not on_gpu:
            return _fits_in_a_child(cfg, mix, target, size)
        try:
            return _fits_here(cfg, accelerator, mix, target, size)
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    size = largest(fits, min(cfg.training.batch_size, ceiling), ceiling)
    if size is None:
        raise OutOfMemoryError(
            f"not even one clip of {mix.shape[-1]} samples trains in the memory of "
            f"{accelerator.device}: lower model.base_channels (now {cfg.model.base_channels}) or "
            "audio.chunk_size"
        )
    return size


def largest(fits: Callable[[int], bool], first: int, ceiling: int) -> int | None:
    """Return the largest size up to `ceiling` that fits, to within an eighth; None if 1 does not.

    Args:
        fits: whether a size does; true for all sizes below one that does.
        first: the size to begin with, 1 to `ceiling`.
        ceiling: largest size of interest.
    """
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


def _fits_here(cfg: Config, accelerator: Any, mix: Tensor, target: Tensor, size: int) -> bool:
    """Make two steps: the optimizer takes its memory in the first one."""
    device, seed = accelerator.device, cfg.training.seed
    try:
        with isolated(device, deterministic=cfg.training.deterministic):
            seed_everything(seed, Stream.WEIGHTS)
            engine = Engine(cfg, DiffusionBufferModel(cfg), accelerator, total_steps=2)
            waves = [w.expand(size, *w.shape).to(device).contiguous() for w in (mix, target)]
            for _ in range(2):
                keys = [(0, i) for i in range(size)]
                generators = example_generators(keys, seed, Stream.EXAMPLE, device)
                engine.step([Batch(waves[0], waves[1], generators)])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _fits_in_a_child(cfg: Config, mix: Tensor, target: Tensor, size: int) -> bool:
    """Make the steps in another process, which may die of it."""
    with tempfile.TemporaryDirectory() as folder:
        trial = {"config": cfg.to_dict(), "mix": mix, "target": target}
        torch.save(trial, Path(folder) / "trial.pt")
        command = [sys.executable, "-m", "diffbuf_lib.training.memory", folder, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (0, TOO_LARGE) or done.returncode < 0:
        return done.returncode == 0
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    raise DiffbufError(f"the trial of a batch of {size} clips failed: {lines[-1]}")


def main(folder: Path, size: int) -> int:
    """Return 0 if two steps of `size` clips can be made, `TOO_LARGE` if not."""
    warnings.simplefilter("ignore")
    trial = load_tensors(folder / "trial.pt", "trial")
    cfg = build_config(trial["config"])
    limit_memory()
    accelerator = make_accelerator(cfg.training, "cpu")
    return 0 if _fits_here(cfg, accelerator, trial["mix"], trial["target"], size) else TOO_LARGE


def limit_memory() -> None:
    """Let this process end where memory does, rather than another one that the system picks."""
    with suppress(ImportError, OSError, ValueError, IndexError):  # where there is no /proc
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = taken_memory() + int(0.9 * free_memory(torch.device("cpu")))
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
