"""Cheaper frames of a stream: one compiled graph with packed weights, and bfloat16.

A frame of `block_causal` is some two hundred small operations. Compiled, its norms, activations and
copies become a few loops, and every weight is laid out once as the convolutions want it.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.model import DiffusionBufferModel, History
from diffbuf_lib.networks import BlockCausal, HistoryCache

Precision = Literal["fp32", "bf16"]


class FastHistory:
    """The step of a network that remembers its history, made faster; see `CachedDenoise`.

    Compiling takes about a minute, when the first stream starts, and takes the weights as they
    are then: weights that change later are not seen.

    Args:
        model: with a block_causal network.
        compiled: run one graph (torch.compile, weights frozen). Results agree to rounding.
        precision: "bf16" runs the network in bfloat16 and everything else in float32: about 40 dB
            below the signal it differs from float32.

    Raises:
        ConfigError: another network, which has no step to make faster.
    """

    def __init__(
        self, model: DiffusionBufferModel, *, compiled: bool, precision: Precision
    ) -> None:
        if not isinstance(model.network, BlockCausal):
            raise ConfigError(
                "compiled and bf16 streams need a model of model.name block_causal, not "
                f"{model.cfg.model.name}"
            )
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision {precision!r} is none of fp32, bf16")
        self.model, self.compiled, self.precision = model, compiled, precision
        self._network_step = model.network.step
        self._warm: set[tuple[int, ...]] = set()
        if compiled:
            self._network_step = torch.compile(model.network.step, dynamic=False)

    def start_history(self, batch: int, num_bins: int, t: Tensor) -> History:
        """Begin after endless silence; compiles, the first time.

        Raises:
            MissingExtraError: there is no C++ compiler to compile with.
        """
        shape = (batch, num_bins, *t.shape)
        # Always of one kind: for a tensor made outside inference mode it would compile again.
        with torch.inference_mode():
            history = self.model.start_history(batch, num_bins, t)
            if self.compiled and shape not in self._warm:
                self._compile(history, num_bins, t)
                self._warm.add(shape)
        return history

    @torch.inference_mode()
    def denoise_next(self, history: Any, V: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Do what `DiffusionBufferModel.denoise_next` does."""
        return self.model.denoise_next(history, V, Y, step=self._step)

    def _compile(self, history: History, num_bins: int, t: Tensor) -> None:
        """Make a step on a copy of the history: the first step compiles."""
        silence = t.new_zeros(history.cache.t.shape[0], num_bins, 1 + t.shape[0])
        silence = torch.complex(silence, silence)
        # Frozen, weights are constants that are packed once for the convolutions. As an option of
        # torch.compile it comes too late: they are inputs of the graph by then.
        frozen = torch._inductor.config.patch(freezing=True)
        try:
            with frozen:
                self.denoise_next(copy.deepcopy(history), silence, silence)
        except torch._inductor.exc.InvalidCxxCompiler as error:
            raise MissingExtraError(
                "a compiled stream needs a C++ compiler, and there is none: install one "
                "(Debian: apt-get install g++), or leave it out"
            ) from error

    def _step(self, history: HistoryCache, x: Tensor) -> Tensor:
        bf16 = self.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            out: Tensor = self._network_step(history, x)
        return out
