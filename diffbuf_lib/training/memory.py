"""Out of memory: what was asked for, what would fit, and the search for the largest batch."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.config import Config, build_config
from diffbuf_lib.errors import DataError, DiffbufError, OutOfMemoryError
from diffbuf_lib.training.feed import Batch, ClipSource, Stream, example_generators, seed_everything
from diffbuf_lib.training.packing import load_json, load_tensors, save_json, save_tensors
from diffbuf_lib.training.signals import isolated
from diffbuf_lib.training.step import Engine, make_accelerator

_SIGNS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "ALLOC_FAILED")
TOO_LARGE = 3
"""Exit status of a trial that ran out of memory in an orderly way."""
_WORKSPACE = 1.3  # memory of a step beside what the backward pass keeps, as a factor on it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the CPU has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def find_batch_size(cfg: Config, train_set: ClipSource, device: str = "auto") -> int:
    """Return the largest batch of which two steps can be trained here.

    On a GPU any size up to that of the training set is tried: doubled while it fits, halved until
    it does, then narrowed to within an eighth. On a CPU sizes above `training.batch_size` are not
    tried, since they make nothing faster, and every trial is a process of its own: where memory
    ends, the system or some C library may end the process rather than raise.

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
            try_batch(cfg, accelerator, mix, target, size)
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
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
    if too_large > ceiling:
        while size < ceiling:
            larger = min(2 * size, ceiling)
            if not fits(larger):
                too_large = larger
                break
            size = larger
    while too_large <= ceiling and too_large - size > max(1, size // 8):
        middle = (size + too_large) // 2
        size, too_large = (middle, too_large) if fits(middle) else (size, middle)
    return size


def explain(error: BaseException, cfg: Config, engine: Engine, batch: Batch) -> str:
    """Say what was asked for, what would fit, and the keys to lower.

    The size that fits is an estimate: what the backward pass of one clip keeps, measured, against
    the memory that is free now.

    Args:
        error: the out-of-memory error; its frames must no longer hold the step's tensors.
        cfg: the config.
        engine: for the model and the precision.
        batch: of the failed step.
    """
    device, size = engine.accelerator.device, len(batch.mix)
    engine.optimizer.zero_grad()
    asked = _asked_for(str(error))
    text = f"out of memory on {device}: {asked} in a step of {size} clips of "
    text += f"{batch.mix.shape[-1]} samples"
    try:
        clip = _bytes_of_a_clip(engine.model, batch, engine.accelerator.autocast)
        weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())
        free = free_memory(device) - 3 * weights  # gradients, and an optimizer's two averages
        fitting = min(int(max(free, 0) / (_WORKSPACE * clip)), max(size - 1, 0))
        text += (
            f"; about {fitting} would fit into the {_amount(max(free, 0))} that are free"
            if fitting
            else f"; not even one clip, about {_amount(_WORKSPACE * clip)}, would fit"
        )
    except Exception:  # no memory for the measurement either: the first error counts
        text += "; not even one clip would fit"
    return (
        f"{text}. Lower training.batch_size (now {cfg.training.batch_size}; --find_batch_size "
        f"finds one that fits, and training.accumulation_steps makes up for it) or "
        f"model.base_channels (now {cfg.model.base_channels})"
    )


def try_batch(cfg: Config, accelerator: Any, mix: Tensor, target: Tensor, size: int) -> None:
    """Make two steps: the optimizer takes its memory in the first one."""
    from diffbuf_lib.model import DiffusionBufferModel

    device, seed = accelerator.device, cfg.training.seed
    with isolated(device, deterministic=cfg.training.deterministic):
        seed_everything(seed, Stream.WEIGHTS)
        engine = Engine(cfg, DiffusionBufferModel(cfg), accelerator, total_steps=2)
        batch = (mix.expand(size, *mix.shape), target.expand(size, *target.shape))
        for _ in range(2):
            generators = example_generators(
                [(0, i) for i in range(size)], seed, Stream.EXAMPLE, device
            )
            waves = [wave.to(device).contiguous() for wave in batch]
            engine.step([Batch(waves[0], waves[1], generators)])


def _fits_in_a_child(cfg: Config, mix: Tensor, target: Tensor, size: int) -> bool:
    """Make the steps in another process, which may die of it; see `main`."""
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "clip.safetensors", {"mix": mix, "target": target})
        save_json(Path(folder) / "config.json", cfg.to_dict())
        command = [sys.executable, "-m", "diffbuf_lib.training.memory", folder, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (0, TOO_LARGE) or done.returncode < 0:
        return done.returncode == 0
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    raise DiffbufError(f"the trial of a batch of {size} clips failed: {lines[-1]}")


def _bytes_of_a_clip(
    model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager[Any]]
) -> int:
    """Measure what a forward pass of one clip keeps for the backward pass."""
    generators = [
        torch.Generator(g.device).manual_seed(g.initial_seed()) for g in batch.generators[:1]
    ]
    with saved_bytes(model) as saved, autocast():
        loss = model(batch.mix[:1], batch.target[:1], generator=generators)
    del loss
    return max(saved.total, 1)


def _asked_for(message: str) -> str:
    if found := re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", message):
        return f"{found[1]} more were asked for"
    if found := re.search(r"tried to allocate (\d+) bytes", message):
        return f"{_amount(int(found[1]))} more were asked for"
    return "more was asked for than is there"


def _amount(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


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


@dataclass
class SavedBytes:
    """What autograd kept: distinct storages, without the weights.

    Attributes:
        total: bytes.
        largest: bytes of the largest one.
    """

    total: int = 0
    largest: int = 0


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves in a block; keep its result until the end of the block.

    Args:
        model: its parameters and buffers are not counted.
    """
    own = {_identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    kept: list[Tensor] = []  # an identity is one only as long as the storage lives
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        identity = _identity(tensor)
        if identity not in own and identity not in seen:
            seen.add(identity)
            kept.append(tensor.detach())
            size = tensor.untyped_storage().nbytes()
            saved.total += size
            saved.largest = max(saved.largest, size)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    kept.clear()


def _identity(tensor: Tensor) -> int:
    """Return what is the same for all tensors on one storage (a data_ptr is 0 without data)."""
    return int(tensor.untyped_storage()._cdata)



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


def main(folder: Path, size: int) -> int:
    """Return 0 if two steps of `size` clips can be made, `memory.TOO_LARGE` if not."""
    warnings.simplefilter("ignore")
    cfg = build_config(load_json(folder / "config.json"))
    clip = load_tensors(folder / "clip.safetensors")
    limit_memory()
    try:
        accelerator = make_accelerator(cfg.training, "cpu")
        try_batch(cfg, accelerator, clip["mix"], clip["target"], size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return TOO_LARGE
    return 0


def limit_memory() -> None:
    """Let this process end where memory does, rather than another one that the system picks."""
    with suppress(ImportError, OSError, ValueError, IndexError):  # where there is no /proc
        import resource

        import torch

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        free = int(0.9 * free_memory(torch.device("cpu")))
        limit = taken_memory() + free
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
