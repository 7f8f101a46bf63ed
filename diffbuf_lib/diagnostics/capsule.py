"""Read a capsule that a failed training step left behind, and make that step again.

    capsule = Capsule.load("results/run/capsule_7")
    print(capsule.replay())

Nothing but the capsule's own files is needed: not the dataset, not the machine. A capsule may come
from a stranger: no pickle is read, the config goes through `build_config`, and sizes are checked
before memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from diffbuf_lib.config import Config, build_config
from diffbuf_lib.diagnostics.replay import ReplayResult, replay_step
from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.training.crash import FORMAT
from diffbuf_lib.training.finding import Finding
from diffbuf_lib.training.packing import load_json, load_tensors, unpack

_LARGEST_JSON = 2**27  # bytes
_LARGEST_SPECTRUM = 2**28  # complex values of one batch
_Seed = Annotated[int, Field(ge=0, lt=2**64)]


class Record(BaseModel):
    """What replay needs of capsule.json, checked."""

    model_config = ConfigDict(extra="ignore")

    format: int
    step: int
    epoch: int
    files: list[list[str]]
    error: dict[str, str]
    finding: Finding | None
    losses: list[float]
    grad_norm: float
    model_class: str
    threads: int = Field(ge=1, le=1024)
    device: str
    precision: Literal["no", "fp16", "bf16"]
    scale: Annotated[float, Field(gt=0)] | None
    seeds: list[list[_Seed]]
    config: dict[str, Any]
    traceback: list[str]


@dataclass(frozen=True)
class Capsule:
    """A failed step; `load` reads one.

    Args:
        path: the folder.
        record: capsule.json.
        cfg: the run's config.
        batch: tensors of batch.safetensors.
        state: model, ema, optimizer, scheduler and scaler, as a checkpoint has them.
        rng: the global generators at the beginning of the step.
        trace: the stages that the step reached, by name.
    """

    path: Path
    record: Record
    cfg: Config
    batch: dict[str, Tensor]
    state: dict[str, Any]
    rng: dict[str, Tensor]
    trace: dict[str, Tensor]

    @classmethod
    def load(cls, path: str | Path) -> Capsule:
        """Read a capsule folder.

        Raises:
            CheckpointError: no capsule, a damaged one, or one whose parts do not fit each other.
            ConfigError: its config is not one of this library.
        """
        path = Path(path)
        if not (path / "capsule.json").is_file():
            raise CheckpointError(
                f"{path} is not a capsule (it holds no capsule.json): give a capsule_<step> folder "
                "of a results folder"
            )
        for name in ("capsule.json", "state.json"):
            if (path / name).is_file() and (path / name).stat().st_size > _LARGEST_JSON:
                raise CheckpointError(f"{path / name} is larger than {_LARGEST_JSON} bytes")
        try:
            record = Record.model_validate(load_json(path / "capsule.json"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{path / 'capsule.json'}: {where}: {first['msg']}") from None
        if record.format != FORMAT:
            raise CheckpointError(
                f"capsule {path} has format {record.format}; this library reads format {FORMAT}"
            )
        cfg = build_config(record.config, source=f"the config of capsule {path}")
        tensors = load_tensors(path / "state.safetensors")
        state = unpack(load_json(path / "state.json"), tensors)
        if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
            raise CheckpointError(f"{path / 'state.json'} holds no model")
        batch, rng, trace = (
            load_tensors(path / f"{name}.safetensors") for name in ("batch", "rng", "trace")
        )
        capsule = cls(path, record, cfg, batch, state, rng, trace)
        capsule._check()
        return capsule

    def replay(self, device: str = "cpu", *, model: nn.Module | None = None) -> ReplayResult:
        """Make the failed step again, up to the first bad value.

        With the same kind of device and the same torch the numbers are those of the failed step to
        the bit. Elsewhere diffusion times and noise are still the same, since they were saved;
        dropout is not.

        Args:
            device: cpu, cuda or cuda:N.
            model: of the run, where it was none of this library's; gets the saved weights.

        Raises:
            CheckpointError: the weights do not fit the config.
            ConfigError: no such device.
        """
        return replay_step(self, device, model)

    def _check(self) -> None:
        """Check that tensors have the shapes that the record and the config promise."""
        stft, buffer = self.cfg.audio.stft, self.cfg.diffusion_buffer
        if len(self.record.files) != len(self.record.seeds) or not self.record.seeds:
            raise CheckpointError(f"capsule {self.path}: files and seeds are not of the same batch")
        for i, seeds in enumerate(self.record.seeds):
            for name in ("mix", "target", "generators"):
                if f"{i}/{name}" not in self.batch:
                    raise CheckpointError(
                        f"capsule {self.path}: batch.safetensors lacks {i}/{name}"
                    )
            mix, target = self.batch[f"{i}/mix"], self.batch[f"{i}/target"]
            if mix.ndim != 3 or not mix.is_floating_point() or not target.is_floating_point():
                raise CheckpointError(f"capsule {self.path}: {i}/mix is {list(mix.shape)}")
            B, T = mix.shape[0], mix.shape[-1]
            if not B == len(seeds) == len(self.record.files[i]):
                raise CheckpointError(f"capsule {self.path}: {B} clips have {len(seeds)} seeds")
            frames = max(1, 1 + (T + stft.n_fft) // stft.hop_length)
            size = B * (stft.n_fft // 2 + 1) * (frames + buffer.buffer_size)
            if size > _LARGEST_SPECTRUM:
                raise CheckpointError(
                    f"capsule {self.path}: its config asks for spectra of {size} values, so "
                    "audio.stft or diffusion_buffer does not fit its batch"
                )
