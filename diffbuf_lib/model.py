"""The Diffusion Buffer: waveforms in, a loss or enhanced waveforms out.

`trace` walks one batch through every stage of training and names each; `forward` is
`trace(...).loss`, so what a notebook inspects is what trains.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from diffbuf_lib import pretrained
from diffbuf_lib.config import Config, build_config
from diffbuf_lib.diffusion.buffer import (
    Generators,
    complex_normal,
    draw_times,
    inference_times,
    perturb,
    uniform,
)
from diffbuf_lib.diffusion.losses import LOSSES, abs2, error_level
from diffbuf_lib.diffusion.sampler import BufferSampler, CachedDenoise
from diffbuf_lib.diffusion.sde import make_sde, over_frequency
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.errors import ShapeError
from diffbuf_lib.networks import BlockCausal, HistoryCache, make_network
from diffbuf_lib.networks.layers import frame_times
from diffbuf_lib.trace import Trace


class Levels(NamedTuple):
    """What follows from a window's diffusion times; a stream, whose times never change, keeps it.

    Attributes:
        sigma: [B, 1, Kb], of the buffer's frames.
        unit: [B, 1, K], what brings V to unit size; None without model.data_scale.
    """

    sigma: Tensor
    unit: Tensor | None


@dataclass
class History:
    """What a stream keeps for a network that remembers its history.

    Attributes:
        cache: the network's own memory, changed at every step.
        levels: of the buffer and the one frame before it.
    """

    cache: HistoryCache
    levels: Levels

    @property
    def num_bytes(self) -> int:
        """Memory, bytes."""
        kept = [tensor for tensor in self.levels if tensor is not None]
        return self.cache.num_bytes + sum(t.numel() * t.element_size() for t in kept)


class DiffusionBufferModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="diffbuf",
    tags=["speech-enhancement", "diffusion"],
    coders={Config: (Config.to_dict, build_config)},
):
    """The Diffusion Buffer (Lay, Makarov, Gerkmann 2025) of one config.

    Args:
        cfg: which network, SDE, buffer, spectrum and loss.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.spectral = Spectral.from_config(
            cfg.audio.stft, cfg.preprocessing.magnitude_compression
        )
        # Enhancement always centres its frames: with frames that start at sample 0 the first
        # samples lie under one window's flank, where overlap-add blows up a modified spectrum.
        self.framing = Spectral.from_config(
            cfg.audio.stft.model_copy(update={"center": True}),
            cfg.preprocessing.magnitude_compression,
        )
        self.sde = make_sde(cfg.sde)
        self.network = make_network(cfg.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss_map = LOSSES[cfg.training.loss]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a model: from a folder, by a bundled name, or by one on the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote; `diffbuf/NAME`,
                found without a network where the package has weights of that name, such as
                diffbuf/cpu-demo; or a repository on the hub.
            options: of `huggingface_hub.PyTorchModelHubMixin.from_pretrained`.
        """
        name = pretrained_model_name_or_path
        bundled = pretrained.FOLDER / str(name).removeprefix("diffbuf/")
        if str(name).startswith("diffbuf/") and bundled.is_dir():
            name = bundled
        loaded: Self = super().from_pretrained(name, **options)
        return loaded

    @property
    def predicts_data(self) -> bool:
        """Whether the network's output is x0_hat rather than a score."""
        return self.cfg.training.loss == "data_prediction"

    def forward(
        self, mix: Tensor, target: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """Return the training loss, or without `target` the enhanced signal.

        Args:
            mix: [B, C, T] float32, full scale 1.
            target: [B, C, T] float32, the clean signal at the same moments.
            generator: where the randomness comes from: one, or one for each example.

        Returns:
            A scalar loss, or [B, C, T] as from `enhance`.

        Raises:
            ShapeError: as in `trace`.
        """
        if target is None:
            return self.enhance(mix, generator)
        return self.trace(mix, target, generator).loss

    def trace(self, mix: Tensor, target: Tensor, generator: Generators = None) -> Trace:
        """Walk one batch through training and keep every stage.

        With training.from_noisy V holds Y in the place of S: the network learns to denoise without
        having seen anything of S. With training.own_estimate V holds, in that share of the clips,
        the network's own first estimate, in history and buffer, as it does online. A network that
        has only seen S there takes its own estimates for the truth: it relies on them, and the
        more steps a frame makes through the buffer, the worse it gets.

        Args:
            mix: [B, C, T] float32, full scale 1.
            target: [B, C, T] float32, the clean signal at the same moments.
            generator: of diffusion times and noise: one, or one for each example.

        Raises:
            ShapeError: not [B, C, T], mix and target of different shapes, or a signal with
                fewer STFT frames than the buffer has.
        """
        if mix.shape != target.shape:
            raise ShapeError(
                f"mix {list(mix.shape)} and target {list(target.shape)} differ: both must be "
                "one [B, C, T] (mono and stereo do not mix)"
            )
        Y, S = self.spectral(_mono(mix)), self.spectral(_mono(target))
        B, num_bins, K = Y.shape
        Kb = self.cfg.diffusion_buffer.buffer_size
        if Kb > K:
            raise ShapeError(
                f"buffer_size {Kb} is larger than the {K} STFT frames of a "
                f"{mix.shape[-1]}-sample signal: lower diffusion_buffer.buffer_size or raise "
                "audio.chunk_size"
            )
        t = draw_times(self.cfg.diffusion_buffer, B, generator, Y.device, Y.real.dtype)
        z = complex_normal((B, num_bins, Kb), generator, Y.device, Y.dtype)
        sigma = self.sde.std(t)
        x0, first_loss = Y if self.cfg.training.from_noisy else S, None
        if share := self.cfg.training.own_estimate:
            first = self._first_estimate(Y, generator)
            first_loss = self._in_data_units(abs2(first - S)).mean() + self._snr_loss(first, S)
            own = uniform((B, 1, 1), generator, Y.device, Y.real.dtype) < share
            x0 = torch.where(own, first.detach(), S)
        V = perturb(x0, Y, t, z, self.sde)
        score, x0_hat = self.denoise(V, Y, t)
        loss_map = self.loss_map(score, x0_hat, S[..., -Kb:], z, over_frequency(sigma, z))
        loss_map = self._in_data_units(loss_map) if self.predicts_data else loss_map
        loss = loss_map.mean() + self._snr_loss(x0_hat, S[..., -Kb:])
        return Trace(
            mix=mix,
            target=target,
            Y=Y,
            S=S,
            t=t,
            sigma=sigma,
            z=z,
            V=V,
            score=score,
            x0_hat=x0_hat,
            target_score=-z / over_frequency(sigma, z),
            loss_map=loss_map,
            loss=loss if first_loss is None else (loss + first_loss) / 2,
        )

    def _snr_loss(self, x0_hat: Tensor, S: Tensor) -> Tensor | float:
        """Return training.snr_weight times the error's level in the linear spectrum."""
        weight = self.cfg.training.snr_weight
        if not weight:
            return 0.0
        return weight * error_level(self.spectral.expand(x0_hat), self.spectral.expand(S))

    def _in_data_units(self, squared_error: Tensor) -> Tensor:
        """Divide by model.data_scale^2: errors of far below 1 vanish beside Adam's epsilon."""
        scale = self.cfg.model.data_scale
        return squared_error if scale is None else squared_error / scale**2

    def _first_estimate(self, Y: Tensor, generator: Generators) -> Tensor:
        """Estimate S from frames that have just entered, V = Y + sigma(t_max) z, all K of them.

        Args:
            Y: [B, F, K] complex, noisy.
            generator: as in `trace`.

        Returns:
            [B, F, K] complex, x0_hat.
        """
        t = Y.real.new_full((Y.shape[0], Y.shape[-1]), self.cfg.diffusion_buffer.t_max)
        z = complex_normal(tuple(Y.shape), generator, Y.device, Y.dtype)
        return self.denoise(perturb(Y, Y, t, z, self.sde), Y, t)[1]

    def denoise(self, V: Tensor, Y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network once.

        A score model's x0_hat follows from Tweedie's formula, E[mean | V] = V + sigma^2 score; a
        data-prediction model's score from its inverse.

        Args:
            V: [B, F, K] complex, perturbed input.
            Y: [B, F, K] complex, noisy spectrum of the same frames.
            t: [B, Kb], diffusion times of the last Kb frames.

        Returns:
            (score, x0_hat), each [B, F, Kb] complex in the precision of V: scaling and loss stay
            in float32 under mixed precision.
        """
        levels = self._levels(t, V.shape[-1])
        return self._estimates(self.network(self._inputs(V, Y, levels), t), V, Y, t, levels)

    def start_history(self, batch: int, num_bins: int, t: Tensor) -> History:
        """Begin streams with a network that remembers its history, after endless silence.

        Args:
            batch: how many streams.
            num_bins: F.
            t: [Kb], the diffusion times of every step.
        """
        assert isinstance(self.network, BlockCausal)
        t = t.expand(batch, -1)
        with evaluating(self):
            return History(self.network.start(num_bins, t), self._levels(t, 1 + t.shape[-1]))

    def denoise_next(
        self,
        history: History,
        V: Tensor,
        Y: Tensor,
        step: Callable[[HistoryCache, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the network once on the buffer, with what it remembers of the history.

        Args:
            history: from `start_history`, changed in place.
            V: [B, F, 1 + Kb] complex: the frame that has just become history, then the buffer.
            Y: [B, F, 1 + Kb] complex, noisy spectrum of the same frames.
            step: a faster equal of the network's own `step`.

        Returns:
            What `denoise` returns for a window that holds the whole past.
        """
        assert isinstance(self.network, BlockCausal)
        cache, levels = history.cache, history.levels
        out = (step or self.network.step)(cache, self._inputs(V, Y, levels))
        return self._estimates(out, V, Y, cache.t, levels)

    def _levels(self, t: Tensor, num_frames: int) -> Levels:
        """Compute what depends on the times [B, Kb] of a window of num_frames frames only."""
        sigma, scale = self.sde.std(t), self.cfg.model.data_scale
        if scale is None:
            return Levels(sigma.unsqueeze(1), None)
        unit = 1 / (frame_times(sigma, num_frames) ** 2 + scale**2).sqrt()  # history: sigma = 0
        return Levels(sigma.unsqueeze(1), unit.unsqueeze(1))

    def _inputs(self, V: Tensor, Y: Tensor, levels: Levels) -> Tensor:
        """Make of V and Y [B, F, K] complex what networks see: [B, 4, F, K] real, channels-last.

        With model.data_scale s the network sees V / sqrt(s^2 + sigma(t)^2) and Y / s, of unit size
        at every t (Karras et al. 2022, arXiv 2206.00364, equation 7). Speech far below sigma is
        else lost beside the noise that the first norm scales it by.
        """
        scale = self.cfg.model.data_scale
        if scale is not None:
            assert levels.unit is not None
            V, Y = V * levels.unit, Y / scale
        x = torch.stack([V.real, V.imag, Y.real, Y.imag], dim=1)
        return x.contiguous(memory_format=torch.channels_last)

    def _estimates(
        self, out: Tensor, V: Tensor, Y: Tensor, t: Tensor, levels: Levels
    ) -> tuple[Tensor, Tensor]:
        """Make a score and an x0_hat of the network's output [B, 2, F, Kb]."""
        out = out.to(V.real.dtype)
        out = torch.complex(out[:, 0], out[:, 1])  # [B, F, Kb]
        sigma, scale = levels.sigma, self.cfg.model.output_scale
        if scale == "time":
            out = out / over_frequency(t, out)
        elif scale == "sigma" and not self.predicts_data:
            out = out / sigma

        Kb = t.shape[-1]
        Vb, Yb = V[..., -Kb:], Y[..., -Kb:]
        if self.predicts_data:
            if self.cfg.model.x0_output == "mask":
                out = Yb + out * Yb
            return (self.sde.mean(out, Yb, t) - Vb) / sigma**2, out
        return out, self.sde.denoised(Vb + sigma**2 * out, Yb, t)

    def sampler(
        self, delay: int | None = None, *, cached: bool | CachedDenoise = True
    ) -> BufferSampler:
        """Make what moves this model's buffer along a stream.

        Args:
            delay: d, 1 to B, of a data-prediction model; None for B.
            cached: let a network that can remember its history do so; the output is the same as
                that of a window K that shows it all it can see. Or what does so in its place: see
                `diffbuf_lib.fast`.

        Raises:
            ConfigError: a delay that this model cannot have.
        """
        memory: CachedDenoise | None
        if isinstance(cached, bool):
            memory = self if cached and isinstance(self.network, BlockCausal) else None
        else:
            memory = cached
        device = next(self.parameters()).device
        dtype = next(self.parameters()).dtype
        return BufferSampler(
            self.denoise,
            self.sde,
            inference_times(self.cfg.diffusion_buffer, device, dtype),
            self.cfg.num_frames,
            predicts_data=self.predicts_data,
            delay=delay,
            cached=memory,
        )

    @torch.inference_mode()
    def enhance(
        self, mix: Tensor, generator: Generators = None, delay: int | None = None
    ) -> Tensor:
        """Enhance whole signals as a stream would, one network call a frame.

        Sample for sample what `OnlineEnhancer` puts out for the same noise.

        Args:
            mix: [B, C, T] float32, full scale 1; channels are averaged to mono, as in training.
            generator: of the diffusion noise; None for the global state.
            delay: d, 1 to B frames, of a data-prediction model; None for B.

        Returns:
            [B, C, T], aligned with mix; C equal channels.

        Raises:
            ShapeError: not [B, C, T], or empty.
            ConfigError: a delay that this model cannot have.
        """
        mono = _mono(mix)
        length, hop = mono.shape[-1], self.framing.hop_length
        # To a whole number of hops: else the last samples lie under the flank of one window, and
        # the overlap-add would divide a modified spectrum by almost nothing.
        Y = self.framing(F.pad(mono, (0, -length % hop)))
        sampler = self.sampler(delay)
        state = sampler.start(Y.shape[0], Y.shape[1], generator, Y.dtype)
        Y = F.pad(Y, (0, sampler.delay - 1))  # silence until the last frame has left the buffer
        with evaluating(self):
            frames = [sampler.step(state, R, generator) for R in Y.unbind(dim=-1)]
        estimate = self.framing.inverse(torch.stack(frames[sampler.delay - 1 :], dim=-1), length)
        return estimate.unsqueeze(1).expand(mix.shape).to(mix.dtype).contiguous()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode, and leave it as it was."""
    was_training = module.training
    module.train(False)
    try:
        yield
    finally:
        module.train(was_training)


def _mono(wave: Tensor) -> Tensor:
    """[B, C, T] to [B, T]: the mean of the channels."""
    if wave.ndim != 3:
        hint = ": add the batch axis with .unsqueeze(0)" if wave.ndim == 2 else ""
        raise ShapeError(f"a batch must be [B, C, T], not {list(wave.shape)}{hint}")
    if 0 in wave.shape:
        raise ShapeError(f"a batch must not be empty, and this one is {list(wave.shape)}")
    return wave.mean(dim=1)
