"""Networks, which all have the same `forward(x, t)`.

    x [B, 4, F, K]    V.real, V.imag, Y.real, Y.imag, channels-last in memory or
                      contiguous (training.memory_format); any F, and K >= Kb
    t [B, Kb]         the diffusion times of the last Kb frames
    out [B, 2, F, Kb] real and imaginary part of the output for the last Kb frames

A network that computes features of Y alone may have `hear(y [B, 2, F, K])`, whose result its
forward then takes as `heard=`, so that calls with the same Y share it. A network that remembers its
history can stream: see `StreamingNetwork`. Callers never check the class of a network
(`registry.NETWORKS`), only what it can do.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeGuard

from torch import Tensor, nn

from diffbuf_lib.config import ModelConfig
from diffbuf_lib.registry import NETWORKS

Precision = Literal["fp32", "bf16"]


class StreamingNetwork(Protocol):
    """What a network provides that need not see its history again."""

    def start(
        self,
        num_bins: int,  # F, bins of the frames to come
        t: Tensor,  # [B, Kb], the diffusion times of the buffer, the same at every step
        *,
        compiled: bool = False,  # make steps faster by compiling them
        precision: Precision = "fp32",  # of the steps
    ) -> Any:
        """Begin B streams after endless silence, and return what the network remembers.

        These are tensors [B, ...] in dataclasses, lists, tuples and dicts; for export, of constant
        shapes. Raises ConfigError for compiled or a precision that this network does not support.
        """

    def step(self, state: Any, x: Tensor) -> Tensor:
        """Take one more frame into the history, and run the buffer after it.

        x [B, 4, F, 1 + Kb] is the frame that has just reached t = 0, then the buffer. Changes the
        state in place; returns [B, 2, F, Kb], as for a window that covers the whole past.
        """


def make_network(cfg: ModelConfig) -> nn.Module:
    """Make the network of `cfg.model`."""
    network: nn.Module = NETWORKS[cfg.name].load()(cfg)
    return network


def can_stream(network: object) -> TypeGuard[StreamingNetwork]:
    """Whether a network remembers its history."""
    return callable(getattr(network, "start", None)) and callable(getattr(network, "step", None))
