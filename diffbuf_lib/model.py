"""The Diffusion Buffer: waveforms in, a loss or enhanced waveforms out.

`trace` walks one batch through every stage of training and names each; `forward` is
`trace(...).loss`, so what a notebook inspects is what trains.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from diffbuf_lib import pretrained
from diffbuf_lib.config import Config, build_config
from diffbuf_lib.data.reader import reason
from diffbuf_lib.diffusion.buffer import (
    Generators,
    complex_normal,
    draw,
    draw_times,
    inference_times,
    perturb,
)
from diffbuf_lib.diffusion.level import RunningLevel
from diffbuf_lib.diffusion.losses import LossInputs, abs2, error_level
from diffbuf_lib.diffusion.sampler import BufferSampler
from diffbuf_lib.diffusion.sde import make_sde, over_frequency
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.errors import ConfigError, ShapeError
from diffbuf_lib.networks import Precision, can_stream, make_network
from diffbuf_lib.networks.layers import frame_times
from diffbuf_lib.registry import LOSSES
from diffbuf_lib.trace import Draws, Trace

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

# No `from __future__ import annotations` here: the hub's mixin needs the type of __init__'s cfg.


class DiffusionBufferModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="diffbuf",
    tags=["speech-enhancement", "diffusion"],
    coders={Config: (Config.to_dict, build_config)},
):
    """The Diffusion Buffer (Lay, Makarov, Gerkmann 2025), built from a config."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        stft, compression = cfg.audio.stft, cfg.preprocessing.magnitude_compression
        self.spectral = Spectral.from_config(stft, compression)
        # Enhancement always centres its frames: with frames that start at sample 0 the first
        # samples lie under one window's flank, where overlap-add blows up a modified spectrum.
        self.framing = Spectral.from_config(stft.model_copy(update={"center": True}), compression)
        self.level = RunningLevel.from_config(cfg, self.spectral)
        self.sde = make_sde(cfg.sde)
        self.network: Any = make_network(cfg.model)
        self.set_memory_format("channels_last")
        self.loss_map = LOSSES[cfg.training.loss].load()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a model; `options` are those of `huggingface_hub.PyTorchModelHubMixin`.

        The source is a folder written by `save_pretrained`, a run's folder (its model/ is used), or
        a name: diffbuf/cpu-demo, which comes with the package, or a repository on the hub.

        Raises ConfigError if no model is there and the source cannot be a name on the hub.
        """
        location = _location(pretrained_model_name_or_path)
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints
            loaded: Self = super().from_pretrained(location, **options)
        return loaded

    def set_memory_format(self, name: str) -> None:
        """Keep 4-d tensors in one of the memory `FORMATS`: same values, different speed."""
        if name not in FORMATS:
            raise ConfigError(f"memory format {name!r:.40} is unknown: use {' or '.join(FORMATS)}")
        self.memory_format = name
        self.network.to(memory_format=FORMATS[name])

    @property
    def predicts_data(self) -> bool:
        """Whether the network's output is x0_hat rather than a score."""
        return self.cfg.training.predicts_data

    def forward(
        self,
        mix: Tensor,
        target: Tensor | None = None,
        generator: Generators = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Return `trace(...).loss`, a scalar; without `target`, `enhance(mix)`, [B, C, T]."""
        if target is None:
            return self.enhance(mix, generator)
        return self.trace(mix, target, generator, draws).loss

    def trace(
        self,
        mix: Tensor,  # [B, C, T] float32, full scale 1
        target: Tensor,  # [B, C, T] float32, the clean signal, aligned with mix
        generator: Generators = None,  # of diffusion times and noise: one, or one per example
        draws: Draws | None = None,  # instead, the draws of an earlier trace of this shape
    ) -> Trace:
        """Walk one batch through training and keep every stage.

        Raises ShapeError for other shapes, or a signal with fewer STFT frames than the buffer.
        """
        if mix.shape != target.shape:
            differ = f"mix {list(mix.shape)} and target {list(target.shape)} differ"
            raise ShapeError(f"{differ}: use one shape [B, C, T] (mono and stereo do not mix)")
        draws = self.draw(mix, generator) if draws is None else draws
        Y, S, level = self._spectra(mix, target)
        t, z, Kb = draws.t, draws.z, draws.t.shape[-1]
        sigma = self.sde.std(t)
        heard = self._heard(Y)
        x0, first_loss = self._what_is_perturbed(Y, S, draws, heard)
        V = perturb(x0, Y, t, z, self.sde)
        score, x0_hat = self.denoise(V, Y, t, sigma, heard=heard)
        end, sigma_z = S[..., -Kb:], over_frequency(sigma, z)
        loss_map = self.loss_map(LossInputs(score, x0_hat, end, z, sigma_z, self.spectral))
        if self.predicts_data:
            loss_map = self._in_data_units(loss_map)
        loss = loss_map.mean() + self._snr_loss(x0_hat, end)
        loss = loss if first_loss is None else (loss + first_loss) / 2
        return Trace(
            mix=mix, target=target, Y=Y, S=S, t=t, sigma=sigma, z=z, V=V, score=score,
            x0_hat=x0_hat, target_score=-z / sigma_z, loss_map=loss_map, loss=loss, draws=draws,
            level=level,
        )  # fmt: skip

    def _spectra(self, mix: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return Y and S [B, F, K], and the level [B, K] that both were divided by, if any."""
        Y, S = self.spectral(_mono(mix)), self.spectral(_mono(target))
        if self.level is None:
            return Y, S, None
        level = self.level.of_whole(Y)
        scale = self.level.scale(level).unsqueeze(1)
        return Y / scale, S / scale, level

    def draw(self, mix: Tensor, generator: Generators = None) -> Draws:
        """Draw all random numbers to train on a batch of mix's shape, type and device."""
        _check_batch(mix)
        B, num_bins, K = len(mix), self.spectral.num_bins, self.spectral.num_frames(mix.shape[-1])
        buffer = self.cfg.diffusion_buffer
        Kb = buffer.buffers * buffer.buffer_size
        if Kb > K:
            what = f"{K} STFT frames of a {mix.shape[-1]}-sample signal"
            fix = "lower diffusion_buffer.buffer_size or raise audio.chunk_size"
            raise ShapeError(f"buffer_size {Kb} is larger than the {what}: {fix}")
        real = torch.float64 if mix.dtype == torch.float64 else torch.float32
        noise = (generator, mix.device, real.to_complex())
        t = draw_times(buffer, B, generator, mix.device, real)
        z = complex_normal((B, num_bins, Kb), *noise)
        if not self.cfg.training.own_estimate:
            return Draws(t, z)
        first_z = complex_normal((B, num_bins, K), *noise)
        u = draw(torch.rand, (B, 1, 1), generator, device=mix.device, dtype=real)[:, 0, 0]
        return Draws(t, z, first_z, u < self.cfg.training.own_estimate)

    def _what_is_perturbed(
        self, Y: Tensor, S: Tensor, draws: Draws, heard: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what V is made from, [B, F, K], and the loss of the extra network call, if any.

        By default it is S. With training.from_noisy it is Y, so that the network learns to denoise
        without seeing anything of S. With training.own_estimate it is, in that share of the clips,
        the network's own estimate for frames that have just entered, V = Y + sigma(t_max) z, in
        history and buffer as online. A network trained on S alone relies on its own
        estimates as if they were the truth, and gets worse the more steps a frame makes.
        """
        if draws.first_z is None or draws.own is None:
            return (Y if self.cfg.training.from_noisy else S), None
        # With one buffer this includes the history, which a network of many buffers ignores.
        n = Y.shape[-1] if self.cfg.diffusion_buffer.buffers == 1 else draws.t.shape[-1]
        t = Y.real.new_full((Y.shape[0], n), self.cfg.diffusion_buffer.t_max)
        V = perturb(Y, Y, t, draws.first_z[..., -n:], self.sde)
        first = self.denoise(V, Y, t, heard=heard)[1]
        end = S[..., -n:]
        loss = self._in_data_units(abs2(first - end)).mean() + self._snr_loss(first, end)
        own = torch.where(draws.own[:, None, None], first.detach(), end)
        return torch.cat([S[..., :-n], own], dim=-1), loss

    def _snr_loss(self, x0_hat: Tensor, S: Tensor) -> Tensor | float:
        """Return training.snr_weight times the error's level in the linear spectrum."""
        weight = self.cfg.training.snr_weight
        if not weight:
            return 0.0
        return weight * error_level(self.spectral.expand(x0_hat), self.spectral.expand(S))

    def _in_data_units(self, squared_error: Tensor) -> Tensor:
        """Divide by model.data_scale^2: errors far below 1 would vanish beside Adam's epsilon."""
        scale = self.cfg.model.data_scale
        return squared_error if scale is None else squared_error / scale**2

    def denoise(
        self,
        V: Tensor,  # [B, F, K] complex, perturbed input
        Y: Tensor,  # [B, F, K] complex, noisy spectrum of the same frames
        t: Tensor,  # [B, Kb], diffusion times of the last Kb frames
        sigma: Tensor | None = None,  # [B, Kb], the SDE's std(t), if already computed
        # From `start_memory`, changed in place; K is then 1 + Kb: the newest history frame first.
        memory: Any = None,
        heard: Any = None,  # the network's features of Y alone, if already computed
    ) -> tuple[Tensor, Tensor]:
        """Run the network once; return score and x0_hat, each [B, F, Kb] complex.

        A score model's x0_hat follows from Tweedie's formula, E[mean | V] = V + sigma^2 score; a
        data-prediction model's score from its inverse. Both are in the precision of V: scaling and
        loss stay in float32 under mixed precision.
        """
        sigma = self.sde.std(t) if sigma is None else sigma
        x = self._inputs(V, Y, sigma)
        out = self._run(x, t, heard) if memory is None else self.network.step(memory, x)
        out = out.to(V.real.dtype)
        out = torch.complex(out[:, 0], out[:, 1])  # [B, F, Kb]
        scale = self.cfg.model.output_scale
        if scale == "time":
            out = out / over_frequency(t, out)
        elif scale == "sigma" and not self.predicts_data:
            out = out / over_frequency(sigma, out)

        Kb, variance = t.shape[-1], over_frequency(sigma, out) ** 2
        Vb, Yb = V[..., -Kb:], Y[..., -Kb:]
        if not self.predicts_data:
            return out, self.sde.denoised(Vb + variance * out, Yb, t)
        if self.cfg.model.x0_output == "mask":
            out = Yb + out * Yb
        return (self.sde.mean(out, Yb, t) - Vb) / variance, out

    def _run(self, x: Tensor, t: Tensor, heard: Any) -> Tensor:
        buffer, options = self.cfg.diffusion_buffer, {} if heard is None else {"heard": heard}
        if buffer.buffers > 1:
            options["buffers"] = t.shape[-1] // buffer.buffer_size
        return self.network(x, t, **options)

    def _heard(self, Y: Tensor) -> Any:
        """Return what calls with the same Y share, if the network can `hear` it; else None."""
        hear, Y = getattr(self.network, "hear", None), self._of_unit_size(Y)
        return None if hear is None else hear(torch.stack([Y.real, Y.imag], dim=1))

    def _of_unit_size(self, Y: Tensor) -> Tensor:
        scale = self.cfg.model.data_scale
        return Y if scale is None else Y / scale

    def _inputs(self, V: Tensor, Y: Tensor, sigma: Tensor) -> Tensor:
        """Turn V and Y, [B, F, K] complex, into the network's input, [B, 4, F, K] real.

        With model.data_scale s the network sees V / sqrt(s^2 + sigma(t)^2) and Y / s, of unit size
        at every t (Karras et al. 2022, arXiv 2206.00364, equation 7). Otherwise speech far below
        sigma would be lost beside the noise, which sets the scale in the network's first norm.
        """
        scale = self.cfg.model.data_scale
        if scale is not None:
            size = (frame_times(sigma, V.shape[-1]) ** 2 + scale**2).sqrt()  # history: sigma = 0
            V, Y = V / size.unsqueeze(1), self._of_unit_size(Y)
        x = torch.stack([V.real, V.imag, Y.real, Y.imag], dim=1)
        return x.contiguous(memory_format=FORMATS[self.memory_format])

    def start_memory(self, num_bins: int, t: Tensor, **options: Any) -> Any:
        """Begin streams with a network that remembers: see `StreamingNetwork.start`."""
        with evaluating(self):
            return self.network.start(num_bins, t, **options)

    def sampler(
        self,
        delay: int | None = None,  # d, 1 to B, of a data-prediction model; None for B
        *,
        # Let a streaming network remember its history; the output equals that of a window of K
        # frames that covers all it can see.
        cached: bool = True,
        compiled: bool = False,  # compile the steps of a streaming network
        precision: Precision = "fp32",  # of a streaming network; all else is float32
    ) -> BufferSampler:
        """Make the sampler that moves this model's buffer along a stream.

        Raises ConfigError for a delay, compiled or precision that this model does not support.
        """
        start_memory = None
        if cached and can_stream(self.network):
            start_memory = partial(self.start_memory, compiled=compiled, precision=precision)
        elif compiled or precision != "fp32":
            need = "a network that remembers its history, such as model.name block_causal"
            raise ConfigError(f"compiled and bf16 streams need {need}, not {self.cfg.model.name}")
        parameter = next(self.parameters())
        t = inference_times(self.cfg.diffusion_buffer, parameter.device, parameter.dtype)
        return BufferSampler(
            self.denoise, self.sde, t, self.cfg.num_frames, predicts_data=self.predicts_data,
            delay=delay, start_memory=start_memory, level=self.level,
        )  # fmt: skip

    @torch.inference_mode()
    def enhance(
        self,
        mix: Tensor,  # [B, C, T] floating point, full scale 1; channels are averaged
        generator: Generators = None,  # of the diffusion noise; None for the global state
        delay: int | None = None,  # d, 1 to B frames, of a data-prediction model; None for B
    ) -> Tensor:
        """Enhance whole signals as a stream would; returns [B, C, T] with all C channels equal.

        Aligned with mix, and equal to the output of `OnlineEnhancer` for the same noise. Raises
        ShapeError if mix is empty or not [B, C, T], ConfigError for a delay that does not fit.
        """
        mono = _mono(mix).to(next(self.parameters()).dtype)  # [B, T]
        length, hop = mono.shape[-1], self.framing.hop_length
        # Pad to a whole number of hops: otherwise the last samples lie under one window's flank,
        # and overlap-add would divide a modified spectrum by almost zero. Also include all frames
        # that begin within the signal, as a stream does.
        later = (self.framing.n_fft // 2 - 1) // hop
        Y = self.framing(F.pad(mono, (0, -length % hop + later * hop)))
        sampler = self.sampler(delay)
        state = sampler.start(Y.shape[0], Y.shape[1], generator, Y.dtype)
        Y = F.pad(Y, (0, sampler.delay - 1))  # silence until the last frame has left the buffer
        with evaluating(self):
            frames = [sampler.step(state, R, generator) for R in Y.unbind(dim=-1)]
        estimate = self.framing.inverse(torch.stack(frames[sampler.delay - 1 :], dim=-1), length)
        return estimate.unsqueeze(1).expand(mix.shape).to(mix.dtype).contiguous()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, then restore its mode; free if it is in it already."""
    was_training = module.training
    if was_training:  # visiting all submodules takes a tenth of a hop
        module.train(False)
    try:
        yield
    finally:
        if was_training:
            module.train(True)


def resolve_device(name: str, *, fallback: bool = False) -> torch.device:
    """Return the device for auto (CUDA if available), cpu, cuda or cuda:N.

    With `fallback`, returns the CPU if this machine has no CUDA device at all. Raises ConfigError
    for any other name, or a GPU that this machine does not have.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (not count and (kind == "auto" or fallback)):
        return torch.device("cpu")
    if int(number or 0) >= count:
        raise ConfigError(f"device {name} does not exist: this machine has {count} GPUs")
    return torch.device("cuda", int(number) if number else torch.cuda.current_device())


def load_model(
    source: str | Path, device: str = "auto", overrides: Sequence[str] = ()
) -> DiffusionBufferModel:
    """Load a trained model for inference; sources as in `DiffusionBufferModel.from_pretrained`.

    Overrides, `key.path=value`, change its config but not its weights, such as
    diffusion_buffer.buffer_size=10. Raises ConfigError for an unknown model or device (see
    `resolve_device`), or an override that its config refuses.
    """
    where = resolve_device(device)
    try:
        model = DiffusionBufferModel.from_pretrained(source)
    except (OSError, HFValidationError) as error:  # the hub's errors, also offline, are OSErrors
        what = f"model {source} is not a local folder and could not be fetched by name"
        raise ConfigError(f"{what}: {reason(error)[:200]}") from error
    if overrides:
        weights, model = model.state_dict(), DiffusionBufferModel(model.cfg.override(*overrides))
        model.load_state_dict(weights)
    return model.to(where).eval()


def fingerprint(model: DiffusionBufferModel) -> str:
    """Return a hash of config and weights, 16 hexadecimal digits: equal for equal models."""
    digest = hashlib.sha256(model.cfg.to_yaml().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _location(source: str | Path) -> str | Path:
    """Return the folder of a model, or the name of one that is not on this machine."""
    folder, name = Path(source), str(source)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if name in pretrained.NAMES:
        return pretrained.FOLDER / folder.name
    of_hub = re.fullmatch(r"(?!diffbuf/)[\w.-]+/[\w.-]+", name)
    if folder.exists() or not of_hub:
        fix = "give a trained model's folder, such as results/demo/model, or a name such as"
        raise ConfigError(f"model {source}: no model is there; {fix} {', '.join(pretrained.NAMES)}")
    return name


def _check_batch(wave: Tensor) -> None:
    if wave.ndim != 3:
        hint = ": add the batch axis with .unsqueeze(0)" if wave.ndim == 2 else ""
        raise ShapeError(f"a batch must be [B, C, T], not {list(wave.shape)}{hint}")
    if 0 in wave.shape:
        raise ShapeError(f"a batch must not be empty, but this one is {list(wave.shape)}")


def _mono(wave: Tensor) -> Tensor:
    """[B, C, T] to [B, T]: the mean of the channels."""
    _check_batch(wave)
    return wave.mean(dim=1)
