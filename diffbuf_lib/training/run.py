"""Training as a generator: one `StepRecord` an optimizer step.

A script exhausts it, a notebook takes `next(run)`. Whoever stops asking, by `close()`, Ctrl-C or
SIGTERM, can go on later with `resume=True` and gets the weights of a run that never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

import diffbuf_lib
from diffbuf_lib.config import Config, TrainingConfig
from diffbuf_lib.errors import CheckpointError, DataError, DiffbufError, NonFiniteError
from diffbuf_lib.training.failures import Failures
from diffbuf_lib.training.feed import Batch, ClipSource, EpochPlan, Feed, Stream, seed_everything
from diffbuf_lib.training.folder import (
    FolderLock,
    ResultsFolder,
    RunLog,
    apply_weights,
    load_weights,
    save_checkpoint,
)
from diffbuf_lib.training.metrics import check_metrics
from diffbuf_lib.training.optimizer import check_place
from diffbuf_lib.training.signals import StopRequest, isolated
from diffbuf_lib.training.step import Engine, Outcome, Validation, make_accelerator, validate

__all__ = ["StepRecord", "train"]


def train(
    cfg: Config,
    train_set: ClipSource,
    valid_set: ClipSource | None,
    results_path: str | Path,
    *,
    resume: bool = False,
    start_check_point: str | Path | None = None,
    device: str = "auto",
    progress: bool = False,
    model: nn.Module | None = None,
) -> Generator[StepRecord, None, None]:
    """Train, yielding a record after every optimizer step.

    The generator may be abandoned at any time: on `close()`, Ctrl-C, SIGTERM or an error between
    steps it saves a checkpoint and closes its logs. A signal waits for the end of a step and is
    then raised as KeyboardInterrupt; a second one does not wait, and saves nothing. For a loop
    whose body can fail, `with contextlib.closing(train(...)) as run:` closes at once.

    Args:
        cfg: the config; `cfg.training` is what matters here.
        train_set: `[i] -> (mix, target)`, each [C, T] float32, full scale 1.
        valid_set: the same; None or empty: no validation, and the learning rate stays.
        results_path: folder for checkpoints, logs and the model; see `training.folder`.
        resume: go on with the run in `results_path`.
        start_check_point: a checkpoint file or a `save_pretrained` folder whose weights (averaged
            ones, if there) are the first ones. Not read when resuming.
        device: "auto", "cpu", "cuda" or "cuda:N". Without a CUDA device: a warning, and the CPU.
        progress: draw a progress bar on standard error.
        model: a model to train in place; default: a new one, seeded by `training.seed`.

    Yields:
        One record a step. A step is also one whose update the float16 scaler skipped.

    Raises:
        CheckpointError: the folder holds a run (without `resume`), none or one of another config
            (with it), weights do not fit, or a file cannot be written.
        NonFiniteError: the loss or gradient is NaN or infinite; names the files. The checkpoints
            are from before. With float16, infinite gradients are the scaler's search and no
            error, until its scale has fallen below 1.
        DataError: an empty training set, or a clip that cannot be read; names it.
        MissingExtraError, ConfigError: a metric or device that cannot be had.
    """
    stop = StopRequest()
    stop.install()
    run, abandoned = None, False
    try:
        with stop.running():
            run = Run(cfg, train_set, valid_set, results_path, device, model, stop)
            run.begin(resume=resume, start_check_point=start_check_point, progress=progress)
        while (record := run.advance()) is not None:
            yield record
    except (GeneratorExit, KeyboardInterrupt):
        abandoned = True
        raise
    finally:
        try:
            if run is not None:
                run.close(abandoned=abandoned)
        finally:
            stop.restore()


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Args:
        step: counted from 1 over the whole run, resumed or not.
        epoch: counted from 0, as in `set_epoch`.
        loss: mean over the step's examples, on all processes.
        grad_norm: of all gradients together, before clipping. Infinite in a skipped step.
        lr: the learning rate that the step was made with.
        seconds: wall time of the step, reading included, validation not.
        skipped: float16 only: the gradients overflowed, the weights were left as they were and
            the gradient scaler lowered its scale. Normal now and then. Also with
            training.on_nonfinite=skip, for a batch with a loss or gradient that is not finite.
        valid: on the last record of an epoch with validation, and of a run: "loss", the metrics'
            means, and `<metric>_clips`, over how many clips; else None.
        bad_batches: non-finite batches that the run has left out so far.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    skipped: bool = False
    valid: dict[str, float] | None = None
    bad_batches: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


class Run:
    """A run; `diffbuf_lib.training.train` has the arguments' meaning."""

    def __init__(
        self,
        cfg: Config,
        train_set: ClipSource,
        valid_set: ClipSource | None,
        results_path: str | Path,
        device: str,
        model: nn.Module | None,
        stop: StopRequest,
    ) -> None:
        training = cfg.training
        check_metrics(training.metrics, cfg.audio.sample_rate)
        self.cfg, self.stop, self.train_set = cfg, stop, train_set
        self.valid_set = valid_set if valid_set is not None and len(valid_set) else None
        self.folder = ResultsFolder(results_path)
        self.accelerator = make_accelerator(training, device)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.plan = EpochPlan(
            size=len(train_set),
            batch_size=training.batch_size,
            accumulation=training.accumulation_steps,
            processes=self.processes,
            seed=training.seed,
        )
        with self._isolated():
            seed_everything(training.seed, Stream.WEIGHTS)
            model = _new_model(cfg) if model is None else model
            self.engine = Engine(cfg, model, self.accelerator, self._total())
        self.log: RunLog | None = None  # in the main process
        self.feed = Feed(self.plan, training, train_set, self.accelerator.device, self.rank)
        self.judge = Judge(training)
        self.lock = FolderLock(self.folder.path)
        self.failures = Failures(cfg, self.folder.path, self.engine, self.plan, train_set)

        self.step = self.epoch = self.round = 0  # steps made; epoch and round of the next one
        self.bad_batches = 0  # left out so far, with training.on_nonfinite=skip
        self.pending: StepRecord | None = None  # its step is made; it has not been handed out
        self.whole = False
        self.saved: tuple[int, int, bool] | None = None

    def begin(self, *, resume: bool, start_check_point: str | Path | None, progress: bool) -> None:
        """Open the results folder, load what there is to load, save the starting point."""
        if self.accelerator.is_main_process:
            self.lock.acquire()
        if resume:
            self._load(self.folder.load_last(self.cfg))
        else:
            self.folder.check_fresh()
            if start_check_point is not None:
                weights = load_weights(start_check_point)
                for model in (self.engine.model, self.engine.ema.module):
                    apply_weights(model, weights, Path(start_check_point))
        self.accelerator.wait_for_everyone()  # all have looked before the first one writes
        if self.accelerator.is_main_process:
            self.folder.tidy()
            if not resume:
                self._save()  # of step 0: a full disk shows now, and resuming always works
            self.folder.write_config(self.cfg)
            if not self._over():
                self.folder.truncate_history(self.step, validated=self.pending is None)
            self.log = RunLog(
                self.cfg, self.folder, step=self.step, total=self._total(), progress=progress
            )
        self.saved = self._place()
        self.whole = True

    def advance(self) -> StepRecord | None:
        """Make the next step and what is due after it.

        Returns:
            The step's record; None at the end of the run.

        Raises:
            KeyboardInterrupt: a signal has come; the run is whole.
        """
        with self.stop.running(), self._isolated():
            if self.pending is None:
                if self._over():
                    return None
                self.pending = self._train_step()
            return self._finish_step(self.pending)

    def close(self, *, abandoned: bool) -> None:
        """Save where the run stands if it is whole, and close the logs.

        Args:
            abandoned: by its caller, rather than at its end or by an error. Then, as at its end,
                model/ is written where no validation has picked a best one.
        """
        self.feed.stop()
        try:
            if self.whole and self.accelerator.is_main_process:
                if not self.engine.is_finite():
                    warnings.warn(
                        f"weights are not finite: step {self.step} is not saved", stacklevel=2
                    )
                    return
                if self.saved != self._place():
                    self._save()
                if (abandoned or self._over()) and self.judge.best is None and self.step:
                    self.folder.export_model(self.engine.ema.module)
        finally:
            if self.log is not None:
                self.log.close()
            self.engine.close()
            self.lock.release()

    # One step.

    def _train_step(self) -> StepRecord:
        started, lr, training = time.perf_counter(), self.engine.lr, self.cfg.training
        if self.stop.requested and self.processes == 1:
            raise KeyboardInterrupt
        end = min(self.round + training.accumulation_steps, self.plan.rounds)
        rounds = range(self.round, end)
        batches = [self._next_batch(round_) for round_ in rounds]

        self.whole = False
        step = self.step + 1
        outcome = self._make_step(batches, rounds, step)
        bad = self.failures.nonfinite(outcome, batches, rounds, step=step, epoch=self.epoch)
        if bad is not None:
            self._leave_out(bad)
        self.step, self.round = step, end
        self.engine.count_step()
        self.whole = True

        record = StepRecord(
            step=self.step,
            epoch=self.epoch,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=lr,
            seconds=time.perf_counter() - started,
            skipped=outcome.skipped or bad is not None,
            bad_batches=self.bad_batches,
        )
        if self.log is not None:
            self.log.step(record)
        if outcome.stop:
            self._interrupt(record)
        return record

    def _make_step(self, batches: list[Batch], rounds: range, step: int) -> Outcome:
        seed_everything(self.cfg.training.seed, Stream.STEP, self.step, self.rank)  # for dropout
        try:
            return self.engine.step(batches, stop=self.stop.requested)
        except Exception as error:
            if (death := self.feed.death(error)) is not None:  # of a reader, told by a signal
                raise death from error
            known = self.failures.raised(error, batches, rounds, step=step, epoch=self.epoch)
            if known is error:
                raise
            raise known from error

    def _leave_out(self, error: NonFiniteError) -> None:
        """Go on without a batch that is not finite, or raise its error."""
        training = self.cfg.training
        if training.on_nonfinite == "stop":
            raise error
        if self.bad_batches >= training.max_skipped:
            raise NonFiniteError(
                f"{error}. {self.bad_batches} batches were left out before, and "
                f"training.max_skipped is {training.max_skipped}"
            )
        self.bad_batches += 1
        warnings.warn(
            f"left out, {self.bad_batches} of at most {training.max_skipped}: {error}", stacklevel=2
        )

    def _next_batch(self, round_: int) -> Batch:
        try:
            return self.feed.batch(self.epoch, round_)
        except DataError:
            if self.stop.requested and self.processes == 1:
                raise KeyboardInterrupt from None  # the same signal has ended our readers
            raise

    def _interrupt(self, record: StepRecord) -> NoReturn:
        """Stop after a step whose record was not handed out: a resumed run will begin with it."""
        self.pending = record
        raise KeyboardInterrupt

    # After a step.

    def _finish_step(self, record: StepRecord) -> StepRecord:
        """Validate, turn to the next epoch and save, as far as each is due."""
        epoch_over = self.round >= self.plan.rounds
        training = self.cfg.training
        due = epoch_over and (self.epoch + 1) % training.valid_every == 0
        # A linear learning rate ends with the run, which a longer run would not have: its last
        # weights, usually the best ones, are judged.
        due = due or (training.lr_schedule == "linear" and self._is_last(epoch_over))
        result = None
        if self.valid_set is not None and (due or self._is_last(epoch_over)):
            result = self._validate(record)
            record = dataclasses.replace(record, valid=result.values)
            if self.log is not None:
                self.log.validation(record, result.values, result.example, final=not due)

        self.whole = False
        # Where a run is cut off, an extra validation is written down but changes nothing that a
        # longer run would not have changed: so going on equals never having stopped.
        is_best = due and result is not None and self._judge(result.values)
        if epoch_over:
            self.epoch, self.round = self.epoch + 1, 0
            self.feed.stop()
        self.pending = None
        self.whole = True

        every = self.cfg.training.checkpoint_every
        if epoch_over or self.step % every == 0 or self._over():
            self._check_weights()
            if is_best and self.accelerator.is_main_process:
                self._save(best=True)
                self.folder.export_model(self.engine.ema.module)
            if self.accelerator.is_main_process:
                self._save()
            self.saved = self._place()
        return record

    def _validate(self, record: StepRecord) -> Validation:
        assert self.valid_set is not None
        result = validate(
            self.cfg,
            self.engine.ema.module,
            self.valid_set,
            self.accelerator,
            lambda: self.stop.requested,
        )
        if result is None:
            self._interrupt(record)
        return result

    def _judge(self, values: dict[str, float]) -> bool:
        """Let a validation change the learning rate; return whether it is the best one."""
        score = self.judge.score(values)
        if score is None:
            return False
        self.engine.judge(score)
        return self.judge.gains(score)

    # Where the run stands.

    def _total(self) -> int:
        """Steps of the whole run, unless it stops early."""
        steps = self.cfg.training.num_epochs * self.plan.steps
        return min(steps, self.cfg.training.num_steps or steps)

    def _is_last(self, epoch_over: bool) -> bool:
        training = self.cfg.training
        enough = training.num_steps is not None and self.step >= training.num_steps
        return enough or (epoch_over and self.epoch + 1 >= training.num_epochs)

    def _over(self) -> bool:
        return (
            self._is_last(False) or self.judge.enough or self.epoch >= self.cfg.training.num_epochs
        )

    def _place(self) -> tuple[int, int, bool]:
        return self.step, self.epoch, self.pending is None

    def _isolated(self) -> AbstractContextManager[None]:
        return isolated(self.accelerator.device, deterministic=self.cfg.training.deterministic)

    def _check_weights(self) -> None:
        if not self.engine.is_finite():
            self.whole = False
            raise NonFiniteError(
                f"step {self.step} (epoch {self.epoch}): weights are not finite after the update "
                f"with lr {self.engine.lr:g}: lower training.lr or set training.grad_clip; the "
                "checkpoints are from before"
            )

    def _save(self, *, best: bool = False) -> None:
        state: dict[str, Any] = {
            "version": diffbuf_lib.__version__,
            "config": self.cfg.to_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "examples": self.round * self.plan.examples_per_round,
            "processes": self.processes,
            "pending": None if self.pending is None else self.pending.to_dict(),
            "best": self.judge.best,
            "bad_validations": self.judge.bad_validations,
            "bad_batches": self.bad_batches,
        }
        save_checkpoint(
            self.folder.best if best else self.folder.last, {**state, **self.engine.state_dict()}
        )

    def _load(self, state: dict[str, Any]) -> None:
        check_place(state)
        if state["processes"] != self.processes:
            warnings.warn(
                f"the run had {state['processes']} processes and goes on with {self.processes}: "
                "its batches change in size",
                stacklevel=2,
            )
        try:
            self.engine.load_state_dict(state)
            self.step, self.epoch = state["step"], state["epoch"]
            self.round = min(
                -(-state["examples"] // self.plan.examples_per_round), self.plan.rounds
            )
            self.pending = StepRecord(**state["pending"]) if state["pending"] else None
            self.judge.best, self.judge.bad_validations = state["best"], state["bad_validations"]
            self.bad_batches = int(state.get("bad_batches", 0))  # older ones have none
            if self.round >= self.plan.rounds and self.pending is None:
                self.epoch, self.round = self.epoch + 1, 0  # a smaller set, or larger rounds
        except (DiffbufError, MemoryError):
            raise
        except Exception as error:  # whatever torch says of a state that is not its own
            raise CheckpointError(
                f"checkpoint {self.folder.last} does not fit this model and optimizer "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): take another "
                "one, such as best.pt"
            ) from error


def _new_model(cfg: Config) -> nn.Module:
    from diffbuf_lib.model import DiffusionBufferModel

    model: nn.Module = DiffusionBufferModel(cfg)
    return model


@dataclass
class Judge:
    """Keeps count of the scores of `training.metric_for_scheduler`.

    Args:
        training: the metric's name and `early_stopping`.
        best: best score so far.
        bad_validations: validations since then.
    """

    training: TrainingConfig
    best: float | None = None
    bad_validations: int = 0

    @property
    def enough(self) -> bool:
        """Whether `training.early_stopping` validations in a row brought no gain."""
        limit = self.training.early_stopping
        return limit is not None and self.bad_validations >= limit

    def score(self, values: dict[str, float]) -> float | None:
        """Pick the deciding score of a validation; None, with a warning, if it is not finite.

        A score that could not be computed for a single clip decides nothing.
        """
        name = self.training.metric_for_scheduler
        if math.isfinite(values[name]):
            return values[name]
        warnings.warn(
            f"no validation clip has a finite {name}: learning rate and early stopping wait",
            stacklevel=2,
        )
        return None

    def gains(self, score: float) -> bool:
        """Count a score; return whether it is the best so far. Losses are better when lower."""
        lower_is_better = self.training.metric_for_scheduler == "loss"
        if self.best is None or (score < self.best if lower_is_better else score > self.best):
            self.best, self.bad_validations = score, 0
            return True
        self.bad_validations += 1
        return False
