"""Read a capsule that a failed training step left behind, and repeat that step.

`print(Capsule.load("results/run/capsule_7").replay())` needs no dataset, and runs on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.config import Config, build_config
from diffbuf_lib.diagnostics.watch import ModuleWatch, watch_modules
from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.model import DiffusionBufferModel, resolve_device
from diffbuf_lib.trace import Draws, StageSummary, Summary, summarise
from diffbuf_lib.training.failure import FORMAT, BadValue, bad_files, bad_stages, bad_tensors
from diffbuf_lib.training.feed import Stream, seed_everything
from diffbuf_lib.training.folder import apply_weights, load_tensors
from diffbuf_lib.training.optimizer import make_optimizer
from diffbuf_lib.training.signals import isolated
from diffbuf_lib.training.step import DTYPES, gradient_norm

_BEFORE = ("mix", "target", "Y", "S", "t", "sigma", "z", "V")  # stages before the network
_ADVICE = {
    "file": "take the file out of the data, or make it again",
    "sigma": "raise diffusion_buffer.t_eps, or bring sde.diffusion closer to its defaults",
    "weight": "go on from an earlier checkpoint, with a lower training.lr or training.grad_clip=1",
    "gradient": "lower training.lr, or set training.grad_clip=1",
    "module": "lower training.lr, or look at this module's inputs in notebook 03",
    "stage": "look at this stage in notebook 03; a larger diffusion_buffer.t_eps often helps",
}


@dataclass(frozen=True)
class Capsule:
    """A failed step; `load` reads one."""

    path: Path
    cfg: Config  # of the run
    record: Any  # what capsule.json shows, by attribute: step, epoch, files, error and so on
    batches: list[dict[str, Any]]  # mix, target and draws of every round
    state: dict[str, Any]  # model, ema, optimizer, scheduler and scaler, as in a checkpoint
    losses: list[float] | None  # of the rounds; None if the step raised an exception
    grad_norm: float  # of the step; NaN if there was none

    @classmethod
    def load(cls, path: str | Path) -> Capsule:
        """Read a folder; CheckpointError or ConfigError if it holds no capsule of this library."""
        path = Path(path)
        content = load_tensors(path / "capsule.pt", "capsule")
        record = content.pop("record", {}) if isinstance(content, dict) else {}
        if (found := record.get("format")) != FORMAT:
            fix = "replay it with the diffbuf that wrote it"
            raise CheckpointError(f"capsule {path} has format {found}, not {FORMAT}: {fix}")
        cfg = build_config(record["config"], source=f"the config of capsule {path}")
        return cls(path, cfg, SimpleNamespace(**record), **content)

    def replay(self, device: str = "cpu", *, model: nn.Module | None = None) -> Replay:
        """Repeat the failed step, up to the first bad value.

        With the same kind of device and the same torch the numbers are those of the failed step to
        the bit. Elsewhere diffusion times and noise are still the same; dropout is not. Pass
        the `model` if it is not one of this library's; it gets the saved weights.
        """
        where, precision = resolve_device(device), self.record.precision
        threads = torch.get_num_threads()
        try:
            with isolated(where, deterministic=self.cfg.training.deterministic):
                torch.set_num_threads(self.record.threads)  # as in the run: sums round alike
                if model is None:
                    model = DiffusionBufferModel(self.cfg)
                    model.set_memory_format(self.record.memory_format)
                apply_weights(model, self.state["model"], self.path / "capsule.pt")
                again = Replay(self, model.to(where), where)
                again.make_step(precision, self.record.scale or 1.0)
                if again.finding is not None and precision != "no":
                    plain = Replay(self, model, where)
                    plain.make_step("no")
                    again.advice = "in float32 the same batch is not finite either"
                    if plain.finding is None:
                        now = f"in float32 the same batch is finite (loss {plain.losses[0]:.4g})"
                        fix = "set training.use_amp=false or training.amp_dtype=bf16"
                        again.advice = f"{now}: {fix}"
                return again
        finally:
            torch.set_num_threads(threads)


@dataclass
class Replay:
    """The step of a capsule, repeated under watch; prints as a table."""

    capsule: Capsule
    model: nn.Module
    device: torch.device
    finding: BadValue | None = None  # the first bad value; None: nothing failed
    # A row for every stage and module output of a round, up to the first bad one.
    visits: list[StageSummary] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # one per round, as far as the step got
    grad_norm: float = math.nan
    error: Exception | None = None  # what the step raised this time
    advice: str = ""  # what to change

    @property
    def reproduced(self) -> bool:
        """Whether it failed in the same way: its loss, its gradient, or the same exception."""
        record = self.capsule.record
        if record.cause == "error" or self.error is not None:
            return type(self.error).__name__ == record.error["type"]
        loss_is_bad = not all(map(math.isfinite, self.losses))
        return self.finding is not None and loss_is_bad == (record.cause == "loss")

    @property
    def same_numbers(self) -> bool:
        """Whether losses and gradient norm also equal those of the failed step to the bit."""
        capsule, now = self.capsule, list(self.losses)
        then = (capsule.losses or now)[: len(now)]  # none, if the step raised an exception
        if capsule.record.cause == "gradient" and capsule.record.processes == 1:
            then, now = [*then, capsule.grad_norm], [*now, self.grad_norm]
        return self.reproduced and [x.hex() for x in then] == [x.hex() for x in now]

    def __str__(self) -> str:
        """Return the walk as a table, and the verdict."""
        table = str(Summary(tuple(self.visits)))
        if self.finding is not None and self.visits and not self.visits[-1].finite:
            table += "  <-- first bad value"
        losses = ", ".join(f"{x:.6g}" for x in self.losses) or "none"
        same, numbers = ("yes" if x else "no" for x in (self.reproduced, self.same_numbers))
        return (
            f"{table}\nloss {losses}; gradient norm {self.grad_norm:.6g}\n"
            f"then: {self.capsule.record.error['message']}\n"
            f"now:  {self.finding or 'nothing fails'}\n"
            f"same failure: {same}; same numbers: {numbers}\nto do: {self.advice or 'nothing'}"
        )

    def make_step(self, precision: str, scale: float = 1.0) -> None:
        """Run the rounds up to a bad value; if there is none, update the weights."""
        record, seed = self.capsule.record, self.capsule.cfg.training.seed
        self.model.train()
        self.model.zero_grad()
        seed_everything(seed, Stream.STEP, record.step - 1, record.rank)  # as in the run
        for round_ in range(len(self.capsule.batches)):
            self._make_round(round_, precision, scale)
            if self.error is not None or (self.finding and self.finding.kind != "gradient"):
                break
        else:
            self._update(scale)
        self.advice = "" if self.finding is None else _ADVICE.get(self.finding.kind, "")

    def _make_round(self, round_: int, precision: str, scale: float) -> None:
        batch, rounds = self.capsule.batches[round_], len(self.capsule.batches)
        mix, target = batch["mix"].to(self.device), batch["target"].to(self.device)
        draws, model = Draws(**batch["draws"]).to(self.device), self.model
        dtype = DTYPES.get(precision)
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        stages: dict[str, Tensor] = {}  # none if the trace fails: so will the step itself
        fork = torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])
        with suppress(Exception), torch.no_grad(), fork, autocast:
            stages = model.trace(mix, target, draws=draws).stages()  # type: ignore[operator]
        with watch_modules(model, gradients=True) as watch:
            try:
                with autocast:
                    loss = model(mix, target, draws=draws)
                self.losses.append(float(loss.detach().float()))
                (loss / rounds * scale).backward()
            except Exception as error:
                self.error = error
        after = dict(stages)
        before = {name: after.pop(name) for name in stages if name in _BEFORE}
        self.visits = [*summarise(before), *watch.visits, *summarise(after)]
        files = bad_files(mix, target, self.capsule.record.files[round_], round_)
        found = next(files, None) or next(self._bad_values(before, watch, after, round_), None)
        for i, row in enumerate(self.visits):  # keep the rows up to the first bad value
            if not row.finite or (found and found.kind == row.name == "sigma"):
                self.visits = self.visits[: i + 1]
                break
        self.finding = self.finding or found

    def _bad_values(
        self, before: dict[str, Tensor], watch: ModuleWatch, after: dict[str, Tensor], round_: int
    ) -> Iterator[BadValue]:
        """Yield what is bad in the order in which the step meets it."""
        yield from bad_stages(before, round_)
        name = watch.first_nonfinite
        module = dict(self.model.named_modules()).get(name or "no module")
        if name is not None and module is not None:
            detail = "its output is the first one that holds NaN or Inf"
            if weight := next(bad_tensors("weight", module.state_dict().items()), None):
                detail += f"; its {weight.name} is not finite: {weight.detail}"
            yield BadValue("module", name, detail, round_)
        if self.error is not None:
            last = f"after {watch.visits[-1].name}" if watch.visits else "before any module"
            yield BadValue("error", last, f"{type(self.error).__name__}: {self.error}", round_)
        yield from bad_stages(after, round_)
        yield from bad_tensors("stage", [("loss", torch.tensor(self.losses[-1]))], round_)
        for name, bad in watch.gradients:
            if bad:
                detail = f"{bad} NaN or Inf, the first from the loss backwards"
                yield BadValue("gradient", name, detail, round_)

    def _update(self, scale: float) -> None:
        """Measure the whole gradient, and if it is finite make the optimizer's step."""
        training, parameters = self.capsule.cfg.training, list(self.model.parameters())
        for p in parameters:
            if p.grad is not None:
                p.grad /= scale
        self.grad_norm = gradient_norm(self.model).item()
        if self.finding is not None:
            return
        if not math.isfinite(self.grad_norm):
            detail = "finite everywhere, but their norm overflows"
            self.finding = BadValue("gradient", "norm", detail)
            return
        try:
            optimizer = make_optimizer(training, self.model)
            optimizer.load_state_dict(self.capsule.state["optimizer"])
            if training.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, training.grad_clip)
            optimizer.step()
            self.finding = next(bad_tensors("weight", self.model.state_dict().items()), None)
        except Exception as error:
            self.error = error
            self.finding = BadValue("error", "the update", f"{type(error).__name__}: {error}")
