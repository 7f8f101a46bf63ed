"""A step that failed: an error that says where, and a capsule beside it that can be replayed.

capsule_<step>/capsule.json   step, epoch, files, error, config and so on, for people and machines
capsule_<step>/capsule.pt     batches, draws, and the engine's state before the step

`diffbuf_lib.diagnostics.capsule` reads and replays it; to look for the first bad module, and for
what to change, is its work. Of a run's capsules the first and the two newest are kept: the first
failure is the most telling one, and a resumed run needs its newest.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffbuf_lib
from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import wait_for_disk
from diffbuf_lib.errors import DiffbufError, NonFiniteError, OutOfMemoryError
from diffbuf_lib.trace import to_plain
from diffbuf_lib.training.feed import Batch, ClipSource, EpochPlan, Stream, seed_everything
from diffbuf_lib.training.memory import explain_out_of_memory, is_out_of_memory
from diffbuf_lib.training.step import Engine, Outcome

FORMAT = 2
_KEPT = 3


@dataclass(frozen=True)
class Attempt:
    """A step to be made."""

    step: int  # counted from 1
    epoch: int  # counted from 0
    rounds: range  # which batches of the epoch
    batches: Sequence[Batch]  # this process's, one a round

    def __str__(self) -> str:
        return f"step {self.step} (epoch {self.epoch})"


@dataclass(frozen=True)
class BadValue:
    """The first bad value that was found."""

    kind: str  # file, weight, stage, sigma, module, gradient or error
    name: str  # of the file, weight, stage or module; for sigma, `t=` and the diffusion time
    detail: str  # one line for people
    round: int = 0  # which batch of an accumulated step

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.detail}"


class Failures:
    """Names and saves the failed steps of a run.

    Args:
        cfg: the config.
        results: the results folder, where capsules go.
        engine: model, optimizer and precision.
        plan: which clips make up which batch.
        train_set: names them.
    """

    def __init__(
        self, cfg: Config, results: Path, engine: Engine, plan: EpochPlan, train_set: ClipSource
    ) -> None:
        self.cfg, self.results, self.engine = cfg, results, engine
        self.plan, self.train_set = plan, train_set
        self.rank = engine.accelerator.process_index

    def nonfinite(self, attempt: Attempt, outcome: Outcome) -> NonFiniteError | None:
        """Return the error of a step that was not made, None for one that was.

        With float16 an infinite gradient is how the gradient scaler finds its scale, and no error:
        the step is skipped and the scale halved. It is one when the scale has fallen below 1,
        where float16 has no more range to give. All processes return an error; the first of those
        with a bad loss writes the capsule.
        """
        bad, scale = ~outcome.losses.isfinite(), self.engine.scale  # [W, R]
        cause = "loss" if bad.any() else "gradient"
        if cause == "loss":
            what = f"the loss is {outcome.losses[bad][0].item()}"
        elif scale is not None and scale < 1:
            what = f"the gradient overflows float16 even at loss scale {scale:g}"
        elif scale is None and not abs(outcome.grad_norm) < float("inf"):
            what = f"the loss is {outcome.loss:.4g} but the gradient norm is {outcome.grad_norm}"
        else:
            return None
        culprits = (bad if bad.any() else ~bad).nonzero().tolist()
        files = [f for rank, i in culprits for f in self._files(attempt, attempt.rounds[i], rank)]
        message = (
            f"{attempt}: {what}; batch {', '.join(files)}; lr {self.engine.lr:g}; "
            f"mixed precision {self._precision(outcome)}"
        )
        if self.rank == culprits[0][0]:
            found = self._first_bad(attempt, cause)
            message += f". First bad value: {found}" if found is not None else ""
            error = NonFiniteError(message)
            message += self._save(attempt, error, cause, found, outcome)
        return NonFiniteError(f"{message}. The checkpoints are from before")

    def raised(self, attempt: Attempt, error: Exception) -> Exception:
        """Return what to raise for an exception within a step, after writing its capsule.

        An error of this library, or one for want of memory, comes back as one line; any other is
        the same exception with a note, so that its type and traceback stay.
        """
        capsule = self._save(attempt, error, "error")
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
            text = explain_out_of_memory(error, self.cfg, self.engine, attempt.batches[0])
            return OutOfMemoryError(f"{attempt}: {text}{capsule}")
        files = ", ".join(f for r in attempt.rounds for f in self._files(attempt, r, self.rank))
        if isinstance(error, DiffbufError):
            return type(error)(f"{attempt}: {error}; batch {files}{capsule}")
        error.add_note(f"{attempt}; batch {files}{capsule}")
        return error

    def _files(self, attempt: Attempt, round_: int, rank: int) -> list[str]:
        order = self.plan.order(attempt.epoch)
        return [self.train_set.name(order[p]) for p in self.plan.positions(round_, rank)]

    def _precision(self, outcome: Outcome) -> str:
        precision = self.engine.accelerator.mixed_precision
        scale = "" if outcome.scale is None else f", loss scale {outcome.scale:g}"
        return "off" if precision == "no" else f"{precision}{scale}"

    def _first_bad(self, attempt: Attempt, cause: str) -> BadValue | None:
        """Name the first bad value, as far as one more forward pass can tell."""
        model: Any = self.engine.model
        rounds = list(enumerate(attempt.batches))
        try:
            for i, batch in rounds:
                files = self._files(attempt, attempt.rounds[i], self.rank)
                if found := bad_file(batch.mix, batch.target, files, i):
                    return found
            if found := first_bad("weight", model.state_dict().items()):
                return found
            if cause == "gradient":  # the last one is nearest to the loss
                gradients = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
                return first_bad("gradient", reversed(gradients))
            seed_everything(self.cfg.training.seed, Stream.STEP, attempt.step - 1, self.rank)
            for i, batch in rounds:
                with torch.no_grad(), self.engine.accelerator.autocast():
                    trace = model.trace(batch.mix, batch.target, _fresh(batch.generators))
                if found := bad_stage(trace.stages(), i):
                    return found
        except Exception as problem:  # such as a GPU that no longer answers
            return BadValue("error", type(problem).__name__, _reason(problem))
        return None

    def _save(
        self,
        attempt: Attempt,
        error: Exception,
        cause: str,
        found: BadValue | None = None,
        outcome: Outcome | None = None,
    ) -> str:
        """Write the capsule; return what the message says of it. Never fails."""
        engine = self.engine
        record = {
            "format": FORMAT,
            "step": attempt.step,
            "epoch": attempt.epoch,
            "rank": self.rank,
            "processes": self.plan.processes,
            "rounds": list(attempt.rounds),
            "files": [self._files(attempt, round_, self.rank) for round_ in attempt.rounds],
            "cause": cause,  # loss or gradient, which is not finite, or error
            "error": {"type": type(error).__name__, "message": str(error)},
            "traceback": "".join(traceback.format_exception(error)).splitlines(),
            "finding": None if found is None else asdict(found),
            "lr": engine.lr,
            "precision": engine.accelerator.mixed_precision,
            "scale": engine.scale if outcome is None else outcome.scale,
            "seeds": [[g.initial_seed() for g in b.generators] for b in attempt.batches],
            "device": engine.accelerator.device.type,
            "threads": torch.get_num_threads(),
            "model_class": type(engine.model).__name__,
            "config": self.cfg.to_dict(),
            "versions": {
                "diffbuf": diffbuf_lib.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
                "system": platform.platform(),
            },
        }
        try:
            content = {
                "batches": [self._batch(batch) for batch in attempt.batches],
                "state": engine.state_dict(),
                "losses": None if outcome is None else outcome.losses[self.rank].tolist(),
                "grad_norm": None if outcome is None else outcome.grad_norm,
            }
            folder = _write(self.results, record, content)
        except Exception as problem:  # a full disk must not mask the first error
            return f". No capsule was written: {type(problem).__name__}: {_reason(problem)}"
        command = f"diffbuf replay {shlex.quote(str(folder))}"
        return f". Capsule: {folder}; `{command}` repeats the step"

    def _batch(self, batch: Batch) -> dict[str, Any]:
        draw = getattr(self.engine.model, "draw", None)  # a model of the user's may have none
        draws = None if draw is None else draw(batch.mix, _fresh(batch.generators)).to_dict()
        return {"mix": batch.mix, "target": batch.target, "draws": draws}


def bad_file(mix: Tensor, target: Tensor, files: Sequence[str], round_: int) -> BadValue | None:
    """Name the first file of a batch, mix and target [B, C, T], whose samples are not finite."""
    for j, name in enumerate(files):
        for what, wave in (("mix", mix[j]), ("target", target[j])):
            bad = (~wave.isfinite()).nonzero()
            if len(bad):
                channel, sample = bad[0].tolist()
                where = f"first at sample {sample} of channel {channel}"
                detail = f"{what} holds {len(bad)} NaN or Inf, {where}: take the file out"
                return BadValue("file", name, detail, round_)
    return None


def bad_stage(stages: Mapping[str, Tensor], round_: int) -> BadValue | None:
    """Name the first stage of a trace that is not finite, or a sigma that divides by zero."""
    for name, value in stages.items():
        bad = (value <= 0) | ~(1 / value).isfinite() if name == "sigma" else torch.tensor(False)
        if bad.any():
            example, frame = bad.nonzero()[0].tolist()
            time = f"{stages['t'][example, frame].item():.6g}"
            detail = (
                f"sigma is {value[example, frame].item():.4g} at diffusion time {time} (example "
                f"{example}, buffer frame {frame}); {int(bad.sum())} of {bad.numel()} are unusable"
            )
            return BadValue("sigma", f"t={time}", detail, round_)
        if found := first_bad("stage", [(name, value)], round_):
            return found
    return None


def first_bad(kind: str, tensors: Iterable[tuple[str, Tensor]], round_: int = 0) -> BadValue | None:
    """Name the first tensor, of (name, tensor) pairs, that is not finite."""
    for name, value in tensors:
        if bad := int((~value.detach().isfinite()).sum()):
            return BadValue(kind, name, f"{bad} of {value.numel()} are NaN or Inf", round_)
    return None


def _write(results: Path, record: dict[str, Any], content: dict[str, Any]) -> Path:
    """Write a capsule, whole or not at all, and remove those between the first and the newest."""
    suffix = f"_rank{record['rank']}" if record["rank"] else ""
    folder = results / f"capsule_{record['step']}{suffix}"
    temporary = results / f".{folder.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        text = json.dumps(to_plain(record), indent=1, allow_nan=False)
        (temporary / "capsule.json").write_text(text, encoding="utf-8")
        torch.save(content, temporary / "capsule.pt")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        wait_for_disk(results)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    others = [path for path in results.glob("capsule_*") if path != folder]
    others.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in others[1 : len(others) + 2 - _KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def _fresh(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """Return generators as they were before the step."""
    return [torch.Generator(g.device).manual_seed(g.initial_seed()) for g in generators]


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
