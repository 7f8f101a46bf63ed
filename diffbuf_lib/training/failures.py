"""From a step that failed to an error that says where and why, and to the capsule beside it."""

from __future__ import annotations

import contextlib
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from diffbuf_lib.config import Config
from diffbuf_lib.errors import DiffbufError, NonFiniteError, OutOfMemoryError
from diffbuf_lib.training import memory
from diffbuf_lib.training.autopsy import Autopsy, stages_of, walk
from diffbuf_lib.training.crash import Scene, global_states, write_capsule
from diffbuf_lib.training.feed import Batch, ClipSource, EpochPlan, Stream, seed_everything
from diffbuf_lib.training.finding import finding_of
from diffbuf_lib.training.finite import describe
from diffbuf_lib.training.step import Engine, Outcome


class Failures:
    """Explains the failed steps of a run.

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

    def nonfinite(
        self, outcome: Outcome, batches: Sequence[Batch], rounds: range, *, step: int, epoch: int
    ) -> NonFiniteError | None:
        """Return the error of a step that was not made, None for one that was.

        All processes get an error alike; the first of those with a bad loss writes the capsule.

        Args:
            outcome: of the step, with the losses of all processes.
            batches: this process's batches.
            rounds: which rounds they are.
            step: counted from 1.
            epoch: counted from 0.
        """
        found = describe(
            outcome,
            batches,
            rounds,
            engine=self.engine,
            plan=self.plan,
            train_set=self.train_set,
            step=step,
            epoch=epoch,
        )
        if found is None:
            return None
        message, writer = found
        error = NonFiniteError(message)
        if writer != self.rank:
            return error
        try:
            scene = self._scene(batches, rounds, step, epoch)
            autopsy = self._walk(scene, outcome.scale)
            note = self._in_float32(scene) if self._mixed else ""
        except Exception as problem:  # such as a GPU that no longer answers
            return NonFiniteError(f"{message}. Looking closer failed: {_one_line(problem)}")
        if autopsy.finding is not None:
            message += f". First bad value: {autopsy.finding}"
        if note:
            message += f". {note}"
        return NonFiniteError(message + self._capsule(scene, autopsy, error, note, outcome.scale))

    def raised(
        self, error: Exception, batches: Sequence[Batch], rounds: range, *, step: int, epoch: int
    ) -> Exception:
        """Return what to raise for an exception within a step, after writing its capsule.

        An error of this library, or one for want of memory, comes back as one line; any other is
        the same exception with a note, so that its type and traceback stay.

        Args:
            error: as it was caught.
            batches: this process's batches.
            rounds: which rounds they are.
            step: counted from 1.
            epoch: counted from 0.
        """
        autopsy = Autopsy()
        try:
            scene = self._scene(batches, rounds, step, epoch)
            autopsy.trace = stages_of(error.__traceback__)
            autopsy.draws = [{k: autopsy.trace[k] for k in ("t", "z") if k in autopsy.trace}]
            if len(batches) > 1:  # which round it was is not known, so its draws are not either
                autopsy.draws = []
            autopsy.finding = finding_of(error, self.engine.model)
            where = f"step {step} (epoch {epoch})"
            if memory.is_out_of_memory(error):
                capsule = self._capsule(scene, autopsy, error)
                autopsy.trace.clear()
                autopsy.draws.clear()
                traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
                text = memory.explain(error, self.cfg, self.engine, batches[0])
                return OutOfMemoryError(f"{where}: {text}{capsule}")
            capsule = self._capsule(scene, autopsy, error)
        except Exception as problem:
            error.add_note(f"no capsule was written: {_one_line(problem)}")
            return error
        if isinstance(error, DiffbufError):
            names = ", ".join(name for batch in scene.names for name in batch)
            with contextlib.suppress(Exception):
                return type(error)(f"{where}: {error}; batch {names}{capsule}")
        error.add_note(f"{where}, in {autopsy.finding.name}{capsule}")
        return error

    @property
    def _mixed(self) -> bool:
        return self.engine.accelerator.mixed_precision != "no"

    def _scene(self, batches: Sequence[Batch], rounds: range, step: int, epoch: int) -> Scene:
        order = self.plan.order(epoch)
        names = [
            [self.train_set.name(order[p]) for p in self.plan.positions(round_, self.rank)]
            for round_ in rounds
        ]
        seed_everything(self.cfg.training.seed, Stream.STEP, step - 1, self.rank)
        rng = global_states(self.engine.accelerator.device)
        return Scene(self.cfg, step, epoch, self.rank, rounds, batches, names, rng)

    def _walk(self, scene: Scene, scale: float | None) -> Autopsy:
        seed_everything(self.cfg.training.seed, Stream.STEP, scene.step - 1, self.rank)
        return walk(
            self.engine.model,
            [_fresh(batch) for batch in scene.batches],
            scene.names,
            autocast=self.engine.accelerator.autocast,
            scale=scale or 1.0,
        )

    def _in_float32(self, scene: Scene) -> str:
        """Say whether the same batch is finite without mixed precision."""
        device = self.engine.accelerator.device.type
        seed_everything(self.cfg.training.seed, Stream.STEP, scene.step - 1, self.rank)
        plain = walk(
            self.engine.model,
            [_fresh(batch) for batch in scene.batches],
            scene.names,
            autocast=lambda: torch.autocast(device, enabled=False),
        )
        if plain.finding is None and plain.error is None:
            loss = sum(plain.losses) / max(len(plain.losses), 1)
            return (
                f"In float32 the same batch is finite (loss {loss:.4g}): set "
                "training.use_amp=false or training.amp_dtype=bf16"
            )
        return "In float32 the same batch is not finite either"

    def _capsule(
        self,
        scene: Scene,
        autopsy: Autopsy,
        error: BaseException,
        note: str = "",
        scale: float | None = None,
    ) -> str:
        """Write the capsule; return what the message says of it. Never fails."""
        scale = self.engine.scale if scale is None else scale
        try:
            folder = write_capsule(self.results, scene, self.engine, autopsy, error, note, scale)
        except Exception as problem:  # a full disk must not mask the first error
            return f". No capsule was written: {_one_line(problem)}"
        command = f"diffbuf replay {shlex.quote(str(folder))}"
        return f". Capsule: {folder}; `{command}` repeats the step"


def _fresh(batch: Batch) -> Batch:
    """Return a batch whose generators are as they were before the step."""
    seeds = [(g.device, g.initial_seed()) for g in batch.generators]
    generators = [torch.Generator(device).manual_seed(seed) for device, seed in seeds]
    return Batch(batch.mix, batch.target, generators)


def _one_line(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {reason}"
