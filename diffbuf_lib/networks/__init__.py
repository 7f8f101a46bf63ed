"""Networks: from [B, 4, F, K] (V and Y, real and imaginary) and times [B, Kb] to [B, 2, F, Kb]."""

from torch import nn

from diffbuf_lib.config import ModelConfig
from diffbuf_lib.networks.block_causal import BlockCausal, HistoryCache
from diffbuf_lib.networks.conv import ConvNet
from diffbuf_lib.networks.ncsnpp import NCSNpp

__all__ = ["BlockCausal", "ConvNet", "HistoryCache", "NCSNpp", "make_network"]


def make_network(cfg: ModelConfig) -> nn.Module:
    """Make the network of `cfg.model`."""
    if cfg.name == "conv":
        return ConvNet(cfg.base_channels, cfg.num_layers, cfg.dropout)
    network = NCSNpp if cfg.name == "ncsnpp" else BlockCausal
    return network(cfg.base_channels, cfg.channel_multipliers, cfg.num_res_blocks, cfg.dropout)
