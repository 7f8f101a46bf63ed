"""A step that failed: an error that says where, and a capsule beside it that can be replayed.

capsule_<step>/capsule.pt     a record, batches, draws, and the engine's state before the step
capsule_<step>/capsule.json   the record, for people: step, files, error, config and so on
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import diffbuf_lib
from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import atomic_file
from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import DiffbufError, NonFiniteError, OutOfMemoryError
from diffbuf_lib.trace import to_plain
from diffbuf_lib.training.feed import Batch, ClipSource, EpochPlan, Stream, seed_everything
from diffbuf_lib.training.memory import explain_out_of_memory, is_out_of_memory
from diffbuf_lib.training.step import Engine, Outcome

FORMAT = 4
_KEPT = 3  # capsules of a run: the first one tells most, and a resumed run needs its newest


class Attempt(NamedTuple):
    """A step to be made."""

    step: int  # counted from 1
    epoch: int  # counted from 0
    rounds: range  # which batches of the epoch
    batches: Sequence[Batch]  # this process's, one per round

    def __str__(self) -> str:
        return f"step {self.step} (epoch {self.epoch})"


class BadValue(NamedTuple):
    """The first bad value that was found."""

    kind: str  # file, weight, stage, sigma, module, gradient or error
    name: str  # of the file, weight, stage or module; for sigma, `t=` and the diffusion time
    detail: str  # one line for people
    round: int = 0  # which batch of an accumulated step

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Failures:
    """Names the failed steps of a run, and saves them in its results folder."""

    cfg: Config
    results: Path
    engine: Engine
    plan: EpochPlan
    train_set: ClipSource
    rank: int  # of this process

    def nonfinite(self, attempt: Attempt, outcome: Outcome) -> NonFiniteError | None:
        """Return the error of a step that was not made, or None if it was made.

        With float16, the gradient scaler finds its scale by infinite gradients: they are an error
        only once the scale has fallen below 1, where float16 has no more range to give. All
        processes return an error; the first of those with a bad loss writes the capsule.
        """
        bad, scale = ~outcome.losses.isfinite(), self.engine.scale  # [W, R]
        cause = "loss" if bad.any() else "gradient"
        if cause == "loss":
            what = f"the loss is {outcome.losses[bad][0].item()}"
        elif scale is not None and scale < 1:
            what = f"the gradient overflows float16 even at loss scale {scale:g}"
        elif scale is None and not math.isfinite(outcome.grad_norm):
            what = f"the loss is {outcome.loss:.4g} but the gradient norm is {outcome.grad_norm}"
        else:
            return None
        culprits = (bad if bad.any() else ~bad).nonzero().tolist()
        files = [f for rank, i in culprits for f in self._files(attempt, attempt.rounds[i], rank)]
        message = f"{attempt}: {what}; batch {', '.join(files)}; lr {self.engine.lr:g}; mixed "
        message += f"precision {self.engine.accelerator.mixed_precision.replace('no', 'off')}"
        message += "" if outcome.scale is None else f", loss scale {outcome.scale:g}"
        if self.rank == culprits[0][0]:
            try:
                found = next(self._bad_values(attempt, cause), None)
            except Exception as problem:  # such as a GPU that no longer answers
                found = BadValue("error", type(problem).__name__, reason(problem))
            message += f". First bad value: {found}" if found is not None else ""
            message += self._save(attempt, NonFiniteError(message), cause, outcome)
        return NonFiniteError(f"{message}. The checkpoints are from before")

    def raised(self, attempt: Attempt, error: Exception) -> Exception:
        """Return what to raise for an exception within a step, after writing its capsule.

        An error of this library, or an out-of-memory error, is returned as one line; any other is
        the same exception with a note added, so that it keeps its type and traceback.
        """
        capsule = self._save(attempt, error, "error", None)
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
            self.engine.optimizer.zero_grad()
            size, device = len(attempt.batches[0].mix), self.engine.accelerator.device
            text = explain_out_of_memory(self.cfg, device, size, str(error))
            return OutOfMemoryError(f"{attempt}: {text}{capsule}")
        files = ", ".join(f for r in attempt.rounds for f in self._files(attempt, r, self.rank))
        if isinstance(error, DiffbufError):
            return type(error)(f"{attempt}: {error}; batch {files}{capsule}")
        error.add_note(f"{attempt}; batch {files}{capsule}")
        return error

    def _files(self, attempt: Attempt, round_: int, rank: int) -> list[str]:
        order = self.plan.order(attempt.epoch)
        return [self.train_set.name(order[p]) for p in self.plan.positions(round_, rank)]

    def _bad_values(self, attempt: Attempt, cause: str) -> Iterator[BadValue]:
        """Yield bad values, as far as one more forward pass can tell."""
        model: Any = self.engine.model  # a DiffusionBufferModel
        for i, batch in enumerate(attempt.batches):
            files = self._files(attempt, attempt.rounds[i], self.rank)
            yield from bad_files(batch.mix, batch.target, files, i)
        yield from bad_tensors("weight", model.state_dict().items())
        if cause == "gradient":  # the last one is nearest to the loss
            gradients = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
            yield from bad_tensors("gradient", reversed(gradients))
            return
        seed_everything(self.cfg.training.seed, Stream.STEP, attempt.step - 1, self.rank)
        for i, batch in enumerate(attempt.batches):
            with torch.no_grad(), self.engine.accelerator.autocast():
                trace = model.trace(batch.mix, batch.target, _fresh(batch))
            yield from bad_stages(trace.stages(), i)

    def _save(self, attempt: Attempt, error: Exception, cause: str, outcome: Outcome | None) -> str:
        """Write the capsule; return what the message says about it. Never fails."""
        engine = self.engine
        model: Any = engine.model
        record = {
            "format": FORMAT,
            "step": attempt.step,
            "epoch": attempt.epoch,
            "rank": self.rank,
            "processes": self.plan.processes,
            "files": [self._files(attempt, round_, self.rank) for round_ in attempt.rounds],
            "cause": cause,  # "loss" or "gradient" if that is not finite, else "error"
            "error": {"type": type(error).__name__, "message": str(error)},
            "traceback": "".join(traceback.format_exception(error)).splitlines(),
            "precision": engine.accelerator.mixed_precision,
            "scale": engine.scale if outcome is None else outcome.scale,
            "device": engine.accelerator.device.type,
            "threads": torch.get_num_threads(),
            "memory_format": getattr(model, "memory_format", "channels_last"),
            "config": self.cfg.to_dict(),
            "versions": {"diffbuf": diffbuf_lib.__version__, "torch": str(torch.__version__)},
        }
        folder = self.results / f"capsule_{attempt.step}{f'_rank{self.rank}' if self.rank else ''}"
        try:
            batches = []
            for batch in attempt.batches:
                draws = model.draw(batch.mix, _fresh(batch)).to_dict()
                batches.append({"mix": batch.mix, "target": batch.target, "draws": draws})
            losses = None if outcome is None else outcome.losses[self.rank].tolist()
            norm = math.nan if outcome is None else outcome.grad_norm
            content = {"record": record, "batches": batches, "state": engine.state_dict()}
            _write(folder, {**content, "losses": losses, "grad_norm": norm})
        except Exception as problem:  # a full disk must not mask the first error
            shutil.rmtree(folder, ignore_errors=True)
            return f". No capsule was written: {type(problem).__name__}: {reason(problem)}"
        command = f"diffbuf replay {shlex.quote(str(folder))}"
        return f". Capsule: {folder}; `{command}` repeats the step"


def bad_files(mix: Tensor, target: Tensor, files: Sequence[str], round_: int) -> Iterator[BadValue]:
    """Yield the files of a batch, mix and target [B, C, T], whose samples are not all finite."""
    for j, name in enumerate(files):
        for what, wave in (("mix", mix[j]), ("target", target[j])):
            bad = (~wave.isfinite()).nonzero()
            if len(bad):
                channel, sample = bad[0].tolist()
                where = f"first at sample {sample} of channel {channel}"
                detail = f"{what} holds {len(bad)} NaN or Inf, {where}: take the file out"
                yield BadValue("file", name, detail, round_)


def bad_stages(stages: Mapping[str, Tensor], round_: int) -> Iterator[BadValue]:
    """Yield the stages of a trace that are not finite, and a sigma that divides by zero."""
    for name, value in stages.items():
        if name == "sigma":
            for example, frame in (~(1 / value).isfinite() | (value <= 0)).nonzero().tolist():
                time, sigma = stages["t"][example, frame].item(), value[example, frame].item()
                where = f"example {example}, buffer frame {frame}"
                detail = f"sigma is {sigma:.4g} at diffusion time {time:.6g} ({where})"
                yield BadValue("sigma", f"t={time:.6g}", detail, round_)
        yield from bad_tensors("stage", [(name, value)], round_)


def bad_tensors(
    kind: str, tensors: Iterable[tuple[str, Tensor]], round_: int = 0
) -> Iterator[BadValue]:
    """Yield a bad value for each (name, tensor) pair that is not finite."""
    for name, value in tensors:
        if bad := int((~value.detach().isfinite()).sum()):
            yield BadValue(kind, name, f"{bad} of {value.numel()} are NaN or Inf", round_)


def _write(folder: Path, content: dict[str, Any]) -> None:
    """Write a capsule, and remove those between the run's first and newest ones."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record = json.dumps(to_plain(content["record"]), indent=1, allow_nan=False)
    (folder / "capsule.json").write_text(record, encoding="utf-8")
    with atomic_file(folder / "capsule.pt") as temporary:  # which makes it a capsule
        torch.save(content, temporary)
    others = [path for path in folder.parent.glob("capsule_*") if path != folder]
    others.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in others[1 : len(others) + 2 - _KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _fresh(batch: Batch) -> list[torch.Generator]:
    """Return a batch's generators as they were before the step."""
    return [torch.Generator(g.device).manual_seed(g.initial_seed()) for g in batch.generators]
