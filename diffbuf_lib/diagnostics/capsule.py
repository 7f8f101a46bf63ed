"""Read a capsule that a failed training step left behind, and make that step again.

    capsule = Capsule.load("results/run/capsule_7")
    print(capsule.replay())

Nothing but the capsule's own files is needed: not the dataset, not the machine.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.config import Config, build_config
from diffbuf_lib.diagnostics.watch import ModuleWatch, watch_modules
from diffbuf_lib.errors import CheckpointError, ConfigError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.trace import Draws, StageSummary, Summary, summarise
from diffbuf_lib.training.checkpoint import apply_weights, load_tensors
from diffbuf_lib.training.failure import FORMAT, BadValue, bad_file, bad_stage, first_bad
from diffbuf_lib.training.feed import Stream, seed_everything
from diffbuf_lib.training.optimizer import make_optimizer
from diffbuf_lib.training.signals import isolated
from diffbuf_lib.training.step import gradient_norm, resolve_device

_BEFORE = ("mix", "target", "Y", "S", "t", "sigma", "z", "V")  # stages before the network
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ADVICE = {
    "file": "take the file out of the data, or make it again",
    "sigma": "raise diffusion_buffer.t_eps, or bring sde.diffusion closer to its defaults",
    "weight": "go on from an earlier checkpoint, with a lower training.lr or training.grad_clip=1",
    "gradient": "lower training.lr, or set training.grad_clip=1",
    "module": "lower training.lr, or look at this module's inputs in notebook 03",
    "stage": "look at this stage in notebook 03; a larger diffusion_buffer.t_eps often helps",
}


@dataclass(frozen=True)
class ReplayResult:
    """What the step came to this time, beside what it came to then; prints as a table.

    Args:
        visits: a row for every stage and module output up to the first bad one, in order, of the
            round that failed or else the last one.
    """

    reproduced: bool  # it failed in the same way: its loss, its gradient, or the same exception
    same_numbers: bool  # and losses and gradient norm are those of the failed step to the bit
    finding: BadValue | None  # the first bad value; None: nothing failed
    expected: str  # what the run said of the failure
    losses: list[float]  # one a round, as far as the step got
    grad_norm: float  # NaN where there was none
    visits: list[StageSummary]
    error: Exception | None  # of the replay
    advice: str  # what to change

    def __str__(self) -> str:
        """Return the walk as a table, and the verdict."""
        table = str(Summary(tuple(self.visits)))
        if self.finding is not None and self.visits and not self.visits[-1].finite:
            table += "  <-- first bad value"
        lines = [
            table,
            f"loss {', '.join(f'{x:.6g}' for x in self.losses) or 'none'}; "
            f"gradient norm {self.grad_norm:.6g}",
            f"then: {self.expected}",
            f"now:  {self.finding or 'nothing fails'}",
            f"same failure: {'yes' if self.reproduced else 'no'}; "
            f"same numbers: {'yes' if self.same_numbers else 'no'}",
        ]
        return "\n".join([*lines, f"to do: {self.advice}"] if self.advice else lines)


@dataclass(frozen=True)
class Capsule:
    """A failed step; `load` reads one."""

    path: Path
    record: Any  # what capsule.json holds, by attribute: step, epoch, files, error and so on
    cfg: Config  # of the run
    batches: list[dict[str, Any]]  # mix, target and draws of every round
    state: dict[str, Any]  # model, ema, optimizer, scheduler and scaler, as in a checkpoint
    losses: list[float] | None  # of the rounds; None if the step raised an exception
    grad_norm: float | None  # of the step; None as for losses

    @classmethod
    def load(cls, path: str | Path) -> Capsule:
        """Read a capsule folder.

        Raises:
            CheckpointError: no capsule, or a damaged one.
            ConfigError: its config is not one of this library.
        """
        path = Path(path)
        if not (path / "capsule.json").is_file():
            raise CheckpointError(
                f"{path} is not a capsule (it holds no capsule.json): give a capsule_<step> folder "
                "of a results folder"
            )
        content = load_tensors(path / "capsule.pt", "capsule")
        try:
            record = SimpleNamespace(**json.loads((path / "capsule.json").read_text("utf-8")))
            if record.format != FORMAT:
                raise CheckpointError(
                    f"capsule {path} has format {record.format}; this library reads {FORMAT}"
                )
            cfg = build_config(record.config, source=f"the config of capsule {path}")
            return cls(path, record, cfg, **content)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError | ConfigError):
                raise
            raise CheckpointError(
                f"{path / 'capsule.json'} cannot be read ({type(error).__name__}: {error}): copy "
                "the folder again"
            ) from error

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
        where, precision = resolve_device(device), self.record.precision
        threads = torch.get_num_threads()
        with isolated(where, deterministic=self.cfg.training.deterministic), ExitStack() as stack:
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(self.record.threads)  # as in the run: sums round alike
            model = DiffusionBufferModel(self.cfg) if model is None else model
            apply_weights(model, self.state["model"], self.path / "capsule.pt")
            walk = _Walk(self, model.to(where), where)
            walk.make_step(precision, self.record.scale or 1.0)
            advice = "" if walk.finding is None else _ADVICE.get(walk.finding.kind, "")
            if walk.finding is not None and precision != "no":
                plain = _Walk(self, model, where)
                plain.make_step("no")
                advice = "in float32 the same batch is not finite either"
                if plain.finding is None:
                    advice = (
                        f"in float32 the same batch is finite (loss {plain.losses[0]:.4g}): set "
                        "training.use_amp=false or training.amp_dtype=bf16"
                    )
        reproduced = self._is_reproduced_by(walk)
        return ReplayResult(
            reproduced=reproduced,
            same_numbers=reproduced and self._has_numbers_of(walk),
            finding=walk.finding,
            expected=self.record.error["message"],
            losses=walk.losses,
            grad_norm=walk.grad_norm,
            visits=walk.visits,
            error=walk.error,
            advice=advice,
        )

    def _is_reproduced_by(self, walk: _Walk) -> bool:
        if self.record.cause == "error" or walk.error is not None:
            return type(walk.error).__name__ == self.record.error["type"]
        loss_is_bad = not all(map(math.isfinite, walk.losses))
        if self.record.cause == "loss":
            return loss_is_bad
        return not loss_is_bad and walk.finding is not None

    def _has_numbers_of(self, walk: _Walk) -> bool:
        if self.losses is None or self.grad_norm is None:
            return True
        then, now = list(self.losses[: len(walk.losses)]), list(walk.losses)
        if self.record.cause == "gradient" and self.record.processes == 1:
            then, now = [*then, self.grad_norm], [*now, walk.grad_norm]
        return [float(x).hex() for x in then] == [float(x).hex() for x in now]


@dataclass
class _Walk:
    """A step of a capsule made again, under watch."""

    capsule: Capsule
    model: nn.Module
    device: torch.device
    losses: list[float] = field(default_factory=list)
    grad_norm: float = math.nan
    finding: BadValue | None = None
    visits: list[StageSummary] = field(default_factory=list)
    error: Exception | None = None

    def make_step(self, precision: str, scale: float = 1.0) -> None:
        """Walk the rounds up to a bad value, and if there is none update the weights."""
        record, seed = self.capsule.record, self.capsule.cfg.training.seed
        self.model.train()
        self.model.zero_grad()
        seed_everything(seed, Stream.STEP, record.step - 1, record.rank)  # as in the run
        for round_ in range(len(self.capsule.batches)):
            self._make_round(round_, precision, scale)
            if self.error is not None or (self.finding and self.finding.kind != "gradient"):
                return
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        self.grad_norm = gradient_norm(self.model).item()
        if not math.isfinite(self.grad_norm) and self.finding is None:
            detail = "finite everywhere, but their norm overflows"
            self.finding = BadValue("gradient", "norm", detail)
        if self.finding is None:
            self._update()

    def _make_round(self, round_: int, precision: str, scale: float) -> None:
        batch, rounds = self.capsule.batches[round_], len(self.capsule.batches)
        mix, target = batch["mix"].to(self.device), batch["target"].to(self.device)
        files, randomness = self.capsule.record.files[round_], self._randomness(round_)
        dtype = _DTYPES.get(precision)
        autocast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
        with autocast:
            stages = self._stages(mix, target, randomness)
        with watch_modules(self.model, gradients=True) as watch:
            try:
                with autocast:
                    loss = self.model(mix, target, **randomness)
                self.losses.append(float(loss.detach().float()))
                (loss / rounds * scale).backward()
            except Exception as error:
                self.error = error
        before = {name: value for name, value in stages.items() if name in _BEFORE}
        after = {name: value for name, value in stages.items() if name not in _BEFORE}
        self.visits = [*summarise(before), *watch.visits, *summarise(after)]
        found = (
            bad_file(mix, target, files, round_)
            or bad_stage(before, round_)
            or self._bad_module(watch, round_)
            or self._bad_exception(watch, round_)
            or bad_stage(after, round_)
            or first_bad("stage", [("loss", torch.tensor(self.losses[-1]))], round_)
        )
        if found is not None and found.kind != "error":
            self._cut_visits(found)
        gradient = next(((name, bad) for name, bad in watch.gradients if bad), None)
        if found is None and gradient is not None:
            detail = f"{gradient[1]} NaN or Inf, the first from the loss backwards"
            found = BadValue("gradient", gradient[0], detail, round_)
        self.finding = self.finding or found

    def _randomness(self, round_: int) -> dict[str, Any]:
        """Return the recorded draws, or what a model without `draw` draws them from."""
        draws = self.capsule.batches[round_]["draws"]
        if draws is not None:
            return {"draws": Draws(**draws).to(self.device)}
        seeds = self.capsule.record.seeds[round_]
        return {"generator": [torch.Generator(self.device).manual_seed(seed) for seed in seeds]}

    def _stages(self, mix: Tensor, target: Tensor, randomness: dict[str, Any]) -> dict[str, Tensor]:
        """Return the stages of the trace; none if it fails, as the step itself will then too."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            try:
                stages: dict[str, Tensor] = self.model.trace(mix, target, **randomness).stages()  # type: ignore[operator]
            except Exception:
                return {}
        return stages

    def _bad_module(self, watch: ModuleWatch, round_: int) -> BadValue | None:
        name = watch.first_nonfinite
        module = dict(self.model.named_modules()).get(name or "no module")
        if name is None or module is None:  # all finite, but perhaps what the whole model returns
            return None
        detail = "its output is the first on the way that holds NaN or Inf"
        if weight := first_bad("weight", module.state_dict().items()):
            detail += f"; its {weight.name} is not finite: {weight.detail}"
        return BadValue("module", name, detail, round_)

    def _bad_exception(self, watch: ModuleWatch, round_: int) -> BadValue | None:
        if self.error is None:
            return None
        last = f"after {watch.visits[-1].name}" if watch.visits else "before any module"
        return BadValue("error", last, f"{type(self.error).__name__}: {self.error}", round_)

    def _cut_visits(self, found: BadValue) -> None:
        """Keep the way up to the first bad value, and that."""
        for i, row in enumerate(self.visits):
            if not row.finite or (found.kind == "sigma" and row.name == "sigma"):
                self.visits = self.visits[: i + 1]
                return

    def _update(self) -> None:
        training = self.capsule.cfg.training
        try:
            optimizer = make_optimizer(training, self.model)
            optimizer.load_state_dict(self.capsule.state["optimizer"])
            if training.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip)
            optimizer.step()
        except Exception as error:
            self.error = error
            self.finding = BadValue("error", "the update", f"{type(error).__name__}: {error}")
            return
        self.finding = first_bad("weight", self.model.state_dict().items())
