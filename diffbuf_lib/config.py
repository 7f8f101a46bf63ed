"""Typed configs: one YAML file per experiment, checked before anything runs.

`load_config(path, overrides)` reads a YAML file into a frozen `Config`; unknown keys are refused
with the nearest valid name, and values that contradict each other (a buffer longer than the clip)
are refused here rather than minutes into a run.
"""

from __future__ import annotations

import difflib
import math
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
import yaml

from diffbuf_lib import registry
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.foreign import is_foreign, put, translate
from diffbuf_lib.registry import Registry


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config file, such as `configs/debug.yaml`; every default is filled in.

    `overrides` are `key.path=value` strings, applied in order; the value is read as YAML.

    Raises ConfigError for a missing file, invalid YAML, an unknown key or a value out of range.
    """
    path = Path(path)
    tree = read_tree(path)
    if is_foreign(tree):
        tree, table = translate(tree, {name for name, *_ in describe_keys()})
        write = "to convert it: diffbuf config import THEIRS.yaml -o OURS.yaml"
        told = f"{path} is a config of Music-Source-Separation-Training, used as it is\n{table}"
        warnings.warn(f"{told}\n{write}", stacklevel=2)
    tree = reduce(_with_override, overrides, tree)
    # Only here: the config in someone else's checkpoint or capsule must not import anything.
    plugins = tree.get("plugins")
    for plugin in plugins if isinstance(plugins, list) else ():  # else build_config refuses it
        try:
            import_module(str(plugin))
        except ImportError as error:
            what = f"plugins of {path}: module {_short(plugin)} cannot be imported ({error})"
            raise ConfigError(f"{what}: install it, or set PYTHONPATH to its folder") from error
    return build_config(tree, source=str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """Read a YAML file of any project unchanged; raises ConfigError if it cannot be read."""
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}: check --config_path") from error
    except ValueError as error:
        what = f"config file {path} is not plain YAML"
        raise ConfigError(f"{what}: {_one_line(str(error))}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds {_short(tree)}, not `section: ...` mappings")
    return tree


def build_config(
    tree: dict[str, Any],  # is not modified
    overrides: Sequence[str] = (),
    source: str = "the config",  # what error messages call it
) -> Config:
    """Build a `Config` from nested dictionaries, checked as by `load_config`."""
    try:
        return Config.model_validate(reduce(_with_override, overrides, tree))
    except pydantic.ValidationError as error:
        problems = "; ".join(_describe(problem, Config) for problem in error.errors()[:20])
        raise ConfigError(_one_line(f"{source}: {problems}")) from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply, or holds itself") from None
    except UnicodeEncodeError as error:  # from pydantic, for a message with invalid Unicode
        told = error.object.encode("utf-8", "backslashreplace").decode()
        raise ConfigError(_one_line(f"{source}: {told}")) from None


class Section(
    pydantic.BaseModel, extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
):
    """Base class of every part of a config: frozen, and refuses unknown keys."""

    # Pairs of full key paths: the first value must be at most, or below, the second.
    at_most: ClassVar[tuple[tuple[str, str], ...]] = ()
    below: ClassVar[tuple[tuple[str, str], ...]] = ()

    @pydantic.model_validator(mode="after")
    def _check_order(self) -> Self:
        for pair in (*self.at_most, *self.below):
            low, high = (getattr(self, path.rpartition(".")[2]) for path in pair)
            if low is None or high is None or low < high or (low == high and pair in self.at_most):
                continue
            fix = f"lower {pair[0]}, or raise the other"
            raise ValueError(f"{pair[0]} {low} is too large for {pair[1]} {high}: {fix}")
        return self


def key(default: Any, description: str, **limits: Any) -> Any:
    """Return a config key: its default, its unit and meaning, and pydantic's limits."""
    return pydantic.Field(default, description=description, **limits)


def _names(choices: Registry) -> pydantic.AfterValidator:
    """Return a validator that checks a name against a registry."""
    return pydantic.AfterValidator(lambda name: choices[name].name)


def _own_keys(choices: Registry) -> pydantic.BeforeValidator:
    """Return a validator for the own keys of the entry that the registry's key selects."""

    def check(given: Any, info: pydantic.ValidationInfo) -> Any:
        parent, _, by = choices.key.rpartition(".")
        name, path = info.data.get(by), f"{parent}.{info.field_name}"  # None if it was refused
        section = None if name is None else choices[name].options or Section
        if section is None or type(given) is section:
            return given
        try:
            return section.model_validate(given)
        except pydantic.ValidationError as error:
            hint = f"the keys of {choices.key} {name} are {', '.join(section.model_fields)}"
            problems = [_describe(problem, section, path, hint) for problem in error.errors()[:5]]
            raise ValueError("; ".join(problems)) from None

    return pydantic.BeforeValidator(check)


class STFTConfig(Section):
    """The short-time Fourier transform."""

    n_fft: int = key(510, "FFT length in samples; n_fft // 2 + 1 bins", ge=2)
    win_length: int = key(510, "window length in samples, at most n_fft", ge=2)
    hop_length: int = key(256, "samples from one frame to the next", ge=1)
    window: Literal["hann", "hamming", "sqrt_hann"] = key("hann", "periodic window")
    center: bool = key(True, "frame k is centred on sample k * hop (else it starts there)")
    at_most = (
        ("audio.stft.win_length", "audio.stft.n_fft"),
        ("audio.stft.hop_length", "audio.stft.win_length"),  # else samples would be lost
    )

    def num_frames(self, samples: int) -> int:
        """STFT frames of a signal of `samples` samples: 1 + T // hop, or 1 + (T - n_fft) // hop."""
        if self.center:
            return 1 + samples // self.hop_length if samples > 0 else 0
        return max(0, 1 + (samples - self.n_fft) // self.hop_length)


class AudioConfig(Section):
    """Sample rate, clip length and STFT."""

    sample_rate: int = key(16000, "Hz; files of another rate are refused", ge=1000)
    chunk_size: int = key(16000, "samples of one training clip", ge=1)
    stft: STFTConfig = STFTConfig()

    @property
    def num_frames(self) -> int:
        """STFT frames of one training clip."""
        return self.stft.num_frames(self.chunk_size)


class CompressionConfig(Section):
    """Magnitude compression c -> beta |c|^alpha e^{i angle c}."""

    alpha: float = key(0.5, "exponent of the magnitude", gt=0, le=1)
    beta: float = key(0.15, "factor on the compressed magnitude", gt=0)


class PreprocessingConfig(Section):
    """What happens between the STFT and the network."""

    magnitude_compression: CompressionConfig = CompressionConfig()
    level_seconds: float | None = key(None, "s, running level to divide frames by; null: off", gt=0)


class ModelConfig(Section):
    """The network."""

    name: Annotated[str, _names(registry.NETWORKS)] = key("ncsnpp", "block_causal is for streaming")
    base_channels: int = key(96, "channels of the first level", ge=4, multiple_of=4)
    channel_multipliers: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = key(
        (1, 2, 2, 2), "width of each level as a multiple of base_channels (not conv)", min_length=1
    )
    num_res_blocks: int = key(1, "residual blocks per level on the way down (not conv)", ge=1)
    num_layers: int = key(4, "conv: hidden 3x3 convolutions", ge=1)
    dropout: float = key(0.0, "probability", ge=0, lt=1)
    data_scale: float | None = key(None, "size of spectra: divides Y and (with sigma) V", gt=0)
    output_scale: Literal["sigma", "time", "time_inside", "none"] = key(
        "sigma", "what the output is divided by; time_inside: before ncsnpp's last layer"
    )
    history_time: float = key(0.0, "(bc_)ncsnpp: time of history frames; authors: 1", ge=0, le=1)
    x0_output: Literal["spectrum", "mask"] = key(
        "spectrum", "data prediction: the output is x0_hat, or M in (1 + M) Y"
    )
    options: Annotated[Any, _own_keys(registry.NETWORKS)] = key({}, "options of a plugin's network")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        inside = self.output_scale == "time_inside"
        networks = ("ncsnpp",) if inside else ("ncsnpp", "bc_ncsnpp")
        if (inside or self.history_time) and self.name not in networks:
            what = f"output_scale {self.output_scale} with history_time {self.history_time}"
            fix = f"with model.name {self.name} use output_scale time and history_time 0"
            raise ValueError(f"{what} is only for {' and '.join(networks)}: {fix}")
        return self


class DiffusionBufferConfig(Section):
    """The buffer: the last B frames, at rising diffusion times."""

    buffer_size: int = key(20, "B, frames; the output delay is B - 1 hops")
    buffers: int = key(1, "per training clip, at its end; above 1 needs model.name recurrent", ge=1)
    num_frames: int | None = key(None, "K, frames of the online window; null: those of chunk_size")
    t_eps: float = key(0.03, "smallest diffusion time of the buffer", gt=0, lt=1)
    t_max: float = key(0.8, "largest diffusion time of the buffer", gt=0, le=1)
    time_sampling: Literal["random", "linspace"] = key("random", "in training; elsewhere linspace")
    leading_zeros: bool = key(True, "K - 1 zero frames before a clip, to train on stream starts")
    at_most = (("diffusion_buffer.buffer_size", "diffusion_buffer.num_frames"),)
    below = (("diffusion_buffer.t_eps", "diffusion_buffer.t_max"),)


class BBEDDiffusion(Section):
    """g(t) = c k^t; give c or theta = c^2, but not both."""

    k: float = key(2.6, "base of the diffusion coefficient", ge=0.001, le=1000.0)
    c: float | None = key(None, "factor of the diffusion coefficient (paper)", gt=0, le=1000.0)
    theta: float | None = key(None, "c squared (authors' code)", gt=0, le=1000000.0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.c is not None and self.theta is not None:
            fix = "c = sqrt(theta): remove sde.diffusion.c or sde.diffusion.theta"
            raise ValueError(f"c {self.c} and theta {self.theta} are both given, but {fix}")
        if self.k == 1:
            raise ValueError("k 1 makes log k zero: use another sde.diffusion.k, such as 2.6")
        return self


class OUVEDiffusion(Section):
    """g(t) = sigma_min (sigma_max / sigma_min)^t sqrt(2 ln(sigma_max / sigma_min))."""

    gamma: float = key(1.5, "stiffness of the drift towards Y", gt=0)
    sigma_min: float = key(0.05, "smallest noise scale", gt=0)
    sigma_max: float = key(0.5, "largest noise scale", gt=0)
    below = (("sde.diffusion.sigma_min", "sde.diffusion.sigma_max"),)


registry.SDES.add("bbed", "diffbuf_lib.diffusion.sde:BBED", options=BBEDDiffusion, t_limit=1.0)
registry.SDES.add("ouve", "diffbuf_lib.diffusion.sde:OUVE", options=OUVEDiffusion)


class SDEConfig(Section):
    """The stochastic differential equation between clean and noisy."""

    type: Annotated[str, _names(registry.SDES)] = key("bbed", "Brownian bridge; or ouve")
    diffusion: Annotated[Any, _own_keys(registry.SDES)] = key({}, "the SDE's own keys")


class DataConfig(Section):
    """Pairs of files, and files that are mixed during training (dataset_type 3)."""

    pair_tolerance: int = key(400, "largest length difference of a pair, samples; trimmed", ge=0)
    attenuation: float = key(0.0, "dB, largest drawn attenuation of a training clip", ge=0, le=80)
    snr_min: float = key(-30.0, "dB, smallest drawn SNR", ge=-100, le=100)
    snr_max: float = key(0.0, "dB, largest drawn SNR", ge=-100, le=100)
    distance_min: float = key(5.0, "m, nearest talker", ge=0.01, le=10000.0)
    distance_max: float = key(20.0, "m, farthest talker", ge=0.01, le=10000.0)
    speed: float = key(0.0, "largest drawn change of the speech's speed and pitch", ge=0, le=0.5)
    tilt: float = key(0.0, "dB per octave, largest drawn spectral tilt of the speech", ge=0, le=12)
    room_probability: float = key(0.0, "share of clips with speech in a room of rooms/", ge=0, le=1)
    cache_path: str | None = key(None, "folder for remote shards; null: ~/.cache/diffbuf")
    cache_gb: float = key(10.0, "GB, largest cache of a set of shards", ge=0)
    at_most = (("data.snr_min", "data.snr_max"), ("data.distance_min", "data.distance_max"))


class TrainingConfig(Section):
    """The training run."""

    loss: Annotated[str, _names(registry.LOSSES)] = key("score", "see diffbuf_lib.diffusion.losses")
    own_estimate: float = key(0.0, "data_prediction: share of V from own estimates", ge=0, le=1)
    from_noisy: bool = key(False, "data_prediction: V from Y alone; half the cost of own_estimate")
    snr_weight: float = key(0.0, "data_prediction: weight of the spectrum's -SNR, dB", ge=0)
    optimizer: Annotated[str, _names(registry.OPTIMIZERS)] = key("adam", "of torch.optim, or muon")
    optimizer_options: Annotated[Any, _own_keys(registry.OPTIMIZERS)] = key({}, "plugin's options")
    lr: float = key(0.0001, "learning rate", gt=0)
    lr_schedule: Literal["plateau", "linear"] = key(
        "plateau", "plateau: lowered when validation stalls; linear: to zero over the last 70 %"
    )
    warmup_steps: int = key(0, "linear: steps over which lr rises", ge=0)
    weight_decay: float = key(0.0, "of the optimizer", ge=0)
    batch_size: int = key(32, "clips per step and process", ge=1)
    overfit_batches: int | None = key(
        None, "train and validate on only the first N batches, with fixed crops; null: all", ge=1
    )
    accumulation_steps: int = key(1, "batches whose gradients make one step", ge=1)
    global_batch: int | None = key(
        None, "clips per step of all processes; sets batch_size, accumulation_steps; or null", ge=1
    )
    num_epochs: int = key(250, "epochs at most", ge=1)
    num_steps: int | None = key(None, "optimizer steps at most; null: no limit", ge=1)
    grad_clip: float | None = key(None, "largest gradient norm; null: no limit", gt=0)
    ema_momentum: float = key(0.999, "decay of the averaged weights", ge=0, lt=1)
    use_amp: bool = key(True, "mixed precision; off on a CPU unless amp_dtype is bf16")
    amp_dtype: Literal["fp16", "bf16"] = key("fp16", "fp16 has a gradient scaler")
    seed: int = key(0, "of weights, crops, diffusion times and noise", ge=0)
    deterministic: bool = key(False, "torch.use_deterministic_algorithms")
    memory_format: Literal["auto", "channels_last", "contiguous"] = key(
        "auto", "of 4-d tensors; auto: a short test on a CPU decides, and a resumed run keeps it"
    )
    num_workers: int = key(4, "processes that read files", ge=0)
    on_nonfinite: Literal["stop", "skip"] = key("stop", "NaN or Inf: stop the run or skip a batch")
    max_skipped: int = key(10, "most batches that on_nonfinite=skip may skip in a run", ge=0)

    metrics: tuple[Annotated[str, _names(registry.METRICS)], ...] = key(
        ("si_sdr",), "scores of the enhanced validation clips", min_length=1
    )
    metric_for_scheduler: str = key("si_sdr", "for lr, early stop and best model: loss or a metric")
    patience: int = key(10, "validations without improvement before lr is lowered", ge=0)
    reduce_factor: float = key(0.5, "lr is multiplied by this", gt=0, lt=1)
    early_stopping: int | None = key(None, "validations without improvement that end a run", ge=1)
    valid_every: int = key(1, "epochs from one validation to the next", ge=1)
    valid_clips: int = key(16, "clips enhanced and scored per validation", ge=1)
    checkpoint_every: int = key(500, "steps between checkpoints within an epoch", ge=1)
    trackers: tuple[Annotated[str, _names(registry.TRACKERS)], ...] = key(
        ("tensorboard",), "where else to log: tensorboard, wandb, trackio"
    )
    tracker_project: str = key("diffbuf", "project of W&B or trackio in which runs are compared")
    checkpoint_minutes: float | None = key(None, "most between checkpoints; null: no limit", gt=0)
    mirror: str | None = key(None, "checkpoint copies, such as s3://bucket/run; --resume reads it")
    log_every: int = key(10, "steps between points logged to the trackers", ge=1)

    @property
    def predicts_data(self) -> bool:
        """Whether the loss treats the network's output as x0_hat rather than as a score."""
        return registry.LOSSES[self.loss].facts.get("predicts") == "data"

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_noisy and self.own_estimate:
            fix = "set it to 0, or set training.from_noisy to false"
            raise ValueError(f"from_noisy needs own_estimate 0, not {self.own_estimate}: {fix}")
        for key in ("own_estimate", "from_noisy", "snr_weight"):
            if getattr(self, key) and not self.predicts_data:
                fix = f"set training.loss to data_prediction, or leave {key} out"
                raise ValueError(f"{key} {getattr(self, key)} is not for loss {self.loss}: {fix}")
        if self.metric_for_scheduler not in (*self.metrics, "loss"):
            what = f"metric_for_scheduler {self.metric_for_scheduler}"
            raise ValueError(f"{what} is not in {list(self.metrics)}: add it to training.metrics")
        return self


class Config(Section):
    """One experiment."""

    plugins: tuple[str, ...] = key((), "modules to import first, such as your networks and losses")
    audio: AudioConfig = AudioConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    model: ModelConfig = ModelConfig()
    diffusion_buffer: DiffusionBufferConfig = DiffusionBufferConfig()
    sde: SDEConfig = SDEConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        buffer, audio = self.diffusion_buffer, self.audio
        frames = audio.num_frames
        if frames < 1:
            what = (
                f"A {audio.chunk_size}-sample chunk has no STFT frame of n_fft {audio.stft.n_fft}"
            )
            fix = "raise audio.chunk_size or lower audio.stft.n_fft"
            raise ValueError(f"Buffer size must be at least 1. {what}: {fix}")
        if buffer.buffer_size < 1:
            fix = f"Raise diffusion_buffer.buffer_size {buffer.buffer_size}"
            raise ValueError(f"Buffer size must be at least 1. {fix}")
        if buffer.buffers * buffer.buffer_size > frames:
            many = buffer.buffers > 1
            times, key = (f"{buffer.buffers} times ", "buffers") if many else ("", "buffer_size")
            has = f"the {frames} STFT frames of a {audio.chunk_size}-sample chunk"
            fix = f"lower diffusion_buffer.{key} or raise audio.chunk_size"
            raise ValueError(f"{times}buffer_size {buffer.buffer_size} is larger than {has}: {fix}")
        if buffer.buffers > 1 and not registry.NETWORKS[self.model.name].facts.get("many_buffers"):
            what = f"buffers {buffer.buffers}: model.name {self.model.name} has one buffer per clip"
            fix = "set diffusion_buffer.buffers to 1, or model.name to recurrent"
            raise ValueError(f"{what}: {fix}")
        limit = registry.SDES[self.sde.type].facts.get("t_limit", math.inf)
        if buffer.t_max >= limit:
            what = f"t_max {buffer.t_max} is where sde.type {self.sde.type} ends and sigma is 0"
            fix = f"lower diffusion_buffer.t_max below {limit:g}"
            raise ValueError(f"{what}, so 1 / sigma is infinite: {fix}")
        return self

    @property
    def num_frames(self) -> int:
        """K: frames of the window that the network sees online."""
        return self.diffusion_buffer.num_frames or self.audio.num_frames

    @property
    def leading_zero_samples(self) -> int:
        """Zero samples that go before a training clip: K - 1 hops, or none."""
        if not self.diffusion_buffer.leading_zeros:
            return 0
        return (self.num_frames - 1) * self.audio.stft.hop_length

    def override(self, *overrides: str) -> Config:
        """Return a changed copy: `cfg.override("training.lr=1e-3", "model.name=conv")`."""
        return build_config(self.to_dict(), overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values, as in the YAML file."""
        return self.model_dump(mode="json", exclude_none=False)

    def to_yaml(self) -> str:
        """Return the whole config, defaults included, as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def describe_keys(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key path, default, description with its unit) of every config key."""
    for name, field in section.model_fields.items():
        path, default = f"{prefix}{name}", field.get_default()
        if path == "sde.diffusion":
            for entry in registry.SDES.values():
                yield from describe_keys(entry.options or Section, f"{path}.")
        elif isinstance(default, Section):
            yield from describe_keys(type(default), f"{path}.")
        else:
            yield path, str(default), field.description or ""


def _with_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of `tree` in which `a.b=value` holds."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    try:
        value = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error
    return put(tree, ".".join(key.strip() for key in path.split(".")), value)


def _describe(problem: Any, section: type[Section], prefix: str = "", hint: str = "") -> str:
    """Return one pydantic problem in one line: where, what, and what would be valid."""
    keys = [str(key) for key in problem["loc"]]
    path = ".".join([prefix, *keys] if prefix else keys)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path}{_nearest(path, section, keys, hint)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message
    return f"{path} = {_short(problem['input'])}: {message[0].lower()}{message[1:]}"


def _parse_yaml(text: str) -> Any:
    """Parse YAML without custom objects; raises ValueError for anything that is not valid."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # PyYAML does not wrap the errors of scalars, such as a 13th month or a number that is too long.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(str(error)) from error


def _short(value: Any) -> str:
    """Abbreviate a value for a message: nested YAML aliases could expand to gigabytes."""
    printer = reprlib.Repr()
    printer.maxstring = printer.maxother = printer.maxlong = 80
    return printer.repr(value)


def _one_line(text: str) -> str:
    """Put a message on one line, cut to fit a terminal."""
    line = " ".join(text.split())
    return line if len(line) < 2000 else f"{line[:2000]} ..."


def _nearest(path: str, section: Any, keys: list[str], hint: str) -> str:
    """Return `; did you mean ...?`, or the valid keys, for an unknown key."""
    for key in keys[:-1]:
        section = type(section.model_fields[key].get_default())
    names = list(section.model_fields)
    close = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
    if close:
        return f": did you mean {path.removesuffix(keys[-1])}{close[0]}?"
    if hint:
        return f": {hint}"
    elsewhere = [known for known, *_ in describe_keys() if known.endswith(f".{keys[-1]}")]
    return f": did you mean {elsewhere[0]}?" if elsewhere else f": the keys are {', '.join(names)}"
