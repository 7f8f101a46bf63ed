"""What memory is free, what this process has, and what autograd keeps of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


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
