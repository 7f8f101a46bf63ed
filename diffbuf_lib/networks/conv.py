"""A plain stack of 3x3 convolutions: small enough to read in a debugger."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from diffbuf_lib.config import ModelConfig
from diffbuf_lib.networks.layers import FrameTimeEmbedding, NormAct, conv, frame_times


class ConvNet(nn.Module):
    """3x3 convolutions with residual connections and the time of every frame added to each.

    For debugging, not for quality: it sees num_layers + 2 frames and bins to each side. Arguments
    are keys of `ModelConfig`; dropout comes after every hidden layer.
    """

    def __init__(self, base_channels: int = 16, num_layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_time = FrameTimeEmbedding(base_channels)
        self.first = conv(4, base_channels)
        self.times = nn.ModuleList(
            nn.Conv1d(4 * base_channels, base_channels, 1) for _ in range(num_layers)
        )
        self.norms = nn.ModuleList(NormAct(base_channels) for _ in range(num_layers))
        self.layers = nn.ModuleList(conv(base_channels, base_channels) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.last = conv(base_channels, 2, zero=True)

    @classmethod
    def from_config(cls, cfg: ModelConfig) -> Self:
        """Make the network of `cfg.model`."""
        return cls(cfg.base_channels, cfg.num_layers, cfg.dropout)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map [B, 4, F, K] and the buffer's times [B, Kb] to [B, 2, F, Kb]."""
        time = self.embed_time(frame_times(t, x.shape[-1]))
        h = self.first(x)
        for norm, layer, add_time in zip(self.norms, self.layers, self.times, strict=True):
            h = h + self.dropout(layer(norm(h + add_time(time).unsqueeze(2))))
        out: Tensor = self.last(h)[..., -t.shape[-1] :]
        return out
