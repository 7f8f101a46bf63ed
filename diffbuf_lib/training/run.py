"""Training as a generator: one `StepRecord` per optimizer step.

The caller may stop iterating and resume later with `resume=True`: the weights are those of a run
that never stopped. A run is "whole" between two steps; only then is a checkpoint saved.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed import DistError

import diffbuf_lib
from diffbuf_lib.config import Config, TrainingConfig
from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import CheckpointError, ConfigError, DiffbufError, NonFiniteError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import feed
from diffbuf_lib.training.failure import Attempt, Failures
from diffbuf_lib.training.folder import (
    FolderLock,
    ResultsFolder,
    RunLog,
    apply_weights,
    load_weights,
    save_checkpoint,
)
from diffbuf_lib.training.metrics import check_metrics, lower_is_better
from diffbuf_lib.training.mirror import Mirror
from diffbuf_lib.training.signals import StopRequest, isolated, keeping_memory
from diffbuf_lib.training.step import (
    Engine,
    Outcome,
    StepRecord,
    fastest_format,
    make_accelerator,
    validate,
)

_PLACE = ("step", "epoch", "best", "bad_validations", "bad_batches")


def train(
    cfg: Config,
    train_set: feed.ClipSource,  # [i] -> (mix, target), each [C, T] float32, full scale 1
    valid_set: feed.ClipSource | None,  # the same; None or empty: no validation
    results_path: str | Path,  # for checkpoints, logs and the model; see `training.folder`
    *,
    # Resume the run there or, if that is further on, in training.mirror; "auto": if there is one.
    resume: bool | Literal["auto"] = False,
    # A checkpoint or a `save_pretrained` folder with the weights (averaged, if it has these) to
    # start from; and whether to validate the first weights, as step 0: this decides nothing, and
    # yields a record whose loss is NaN. Both are ignored when resuming.
    start_check_point: str | Path | None = None,
    pre_valid: bool = False,
    device: str = "auto",  # auto, cpu, cuda or cuda:N; without a CUDA device the CPU, and a warning
    progress: bool = False,  # draw a progress bar on standard error
    model: nn.Module | None = None,  # to train in place; None: a new one, seeded by training.seed
) -> Generator[StepRecord, None, None]:
    """Train, yielding a record after every optimizer step.

    On `close()` (`contextlib.closing`), a signal (see `StopRequest`) or an error between steps it
    saves a checkpoint and closes its logs. A signal waits for the end of a step, in all processes,
    and is then raised as KeyboardInterrupt. A run keeps its global batch: it may resume with
    another number of processes, as long as they can share that batch equally.

    CheckpointError for a run in the folder (with `resume`: none, or one of another config), weights
    that do not fit, or a file that cannot be written; DataError for an empty training set or a clip
    that cannot be read; MissingExtraError, ConfigError for a metric or device that is unavailable.
    NonFiniteError, naming the files, for a loss or gradient that is NaN or infinite (in float16 the
    scaler lowers its scale first); the checkpoints are from before.
    """
    with StopRequest() as stop, ExitStack() as ending:
        with stop.running():
            state = cfg, train_set, valid_set, results_path
            run = Run(*state, resume, device, model, stop, ending)
            ending.callback(run.close)
            run.begin(start_check_point=start_check_point, progress=progress)
        try:
            if pre_valid and not run.resumed and run.valid_set is not None:
                yield run.first_validation()
            while (record := run.next_record()) is not None:
                yield record
        except Exception as error:
            if run.log is not None:
                run.log.failure(run.step + 1, error)
            raise


class Run:
    """A run and where it stands; `train` documents the arguments."""

    def __init__(
        self,
        cfg: Config,
        train_set: feed.ClipSource,
        valid_set: feed.ClipSource | None,
        results_path: str | Path,
        resume: bool | Literal["auto"],
        device: str,
        model: nn.Module | None,
        stop: StopRequest,
        ending: ExitStack,
    ) -> None:
        training = cfg.training
        check_metrics(training.metrics, cfg.audio.sample_rate)
        self.cfg, self.stop = cfg, stop
        self.folder = ResultsFolder(results_path)
        self.accelerator = make_accelerator(training, device)
        if self.accelerator.device.type == "cpu":
            ending.enter_context(keeping_memory())
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        stop.together = self.processes > 1
        self.mirror: Mirror | None = None  # in the main process
        self.state = self._together(partial(self._open, resume, ending))  # to resume from
        self.plan = make_plan(training, len(train_set), self.processes, self.state)
        if training.overfit_batches is not None:
            self.plan = dataclasses.replace(self.plan, shuffled=False)
            size = training.overfit_batches * self.plan.a_round
            valid_set = feed.FixedClips(train_set, size)
            train_set = feed.FixedClips(train_set, size, len(train_set))
        self.valid_set = valid_set if valid_set is not None and len(valid_set) else None
        steps = training.num_epochs * self.plan.steps
        self.total = min(steps, training.num_steps or steps)  # unless it stops early
        with self._isolated():
            # Before seeding: measuring draws random weights. Another format rounds differently.
            kept: Any = self.state and (self.state.get("memory_format", "channels_last"), "")
            choose = partial(fastest_format, cfg, self.accelerator)
            self.memory_format, self.why = kept or self._together(choose)
            feed.seed_everything(training.seed, feed.Stream.WEIGHTS)
            model = DiffusionBufferModel(cfg) if model is None else model
            set_memory_format: Any = getattr(model, "set_memory_format", None)
            if set_memory_format is None:  # a module of the caller's own
                self.why = ""
            else:
                set_memory_format(self.memory_format)
            self.engine = Engine(cfg, model, self.accelerator, self.total)
        reader = feed.ClipReader(train_set, training.num_workers)
        self.feed = feed.Feed(reader, self.plan, self.rank, self.accelerator.device)
        self.batches: Iterator[tuple[Tensor, Tensor]] | None = None  # the rest of this epoch's
        place = self.engine, self.plan, train_set, self.rank
        self.failures = Failures(cfg, self.folder.path, *place)
        self.log: RunLog | None = None  # in the main process

        self.step = self.epoch = self.round = 0  # steps made; epoch and round of the next one
        self.best: float | None = None  # score of the best validation
        self.bad_validations = 0  # since then
        self.bad_batches = 0  # left out so far, with training.on_nonfinite=skip
        self.pending: StepRecord | None = None  # its step is made, but it has not been yielded
        self.resumed = self.state is not None
        self.whole = self.agreed = False  # agreed: all processes stop here
        self.saved = True  # whether last.pt holds this state
        self.saved_at = time.monotonic()

    # From batch to record.

    def first_validation(self) -> StepRecord:
        """Validate before the first step."""
        record = StepRecord(0, 0, math.nan, math.nan, self.engine.lr, 0.0)
        with self.stop.running(), self._isolated():
            return self._validated(record, final=True)

    def next_record(self) -> StepRecord | None:
        """Make the next step and what is due after it; return None at the end of the run."""
        with self.stop.running(), self._isolated():
            if self.pending is None:
                if self._over():
                    return None
                self.pending = self._train_step()
            return self._finish_step(self.pending)

    def _train_step(self) -> StepRecord:
        started, lr = time.perf_counter(), self.engine.lr
        if self.stop.requested and self.processes == 1:  # several stop together, after a step
            raise KeyboardInterrupt
        end = min(self.round + self.plan.accumulation, self.plan.rounds)
        rounds = range(self.round, end)
        batches = [self._next_batch(round_) for round_ in rounds]
        waited = time.perf_counter() - started
        attempt = Attempt(self.step + 1, self.epoch, rounds, batches)

        self.whole = self.saved = False
        outcome = self._make_step(attempt)
        left_out = self._is_left_out(attempt, outcome)
        self.step, self.round = attempt.step, end
        self.engine.count_step()
        self.whole = True

        record = StepRecord(
            step=self.step,
            epoch=self.epoch,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=lr,
            seconds=time.perf_counter() - started,
            skipped=outcome.skipped or left_out,
            bad_batches=self.bad_batches,
            waited=waited,
        )
        if self.log is not None:
            self.log.step(record)
        if outcome.stop:  # before the record is handed out: a resumed run will begin with it
            self.pending = record
            self.stop.requested = self.agreed = True
            raise KeyboardInterrupt
        return record

    def _finish_step(self, record: StepRecord) -> StepRecord:
        """Validate, turn to the next epoch and save, each if it is due."""
        training, epoch_over = self.cfg.training, self.round >= self.plan.rounds
        last = self._is_last(epoch_over)
        due = epoch_over and (self.epoch + 1) % training.valid_every == 0
        # A linear learning rate reaches its end with the run (in a longer run it would not), so its
        # last weights, usually the best ones, are judged.
        due = due or (training.lr_schedule == "linear" and last)
        is_best = False
        if self.valid_set is not None and (due or last):
            record = self._validated(record, final=not due)
            # An extra validation, where a run is cut off, decides nothing, so that resuming equals
            # never having stopped.
            self.whole = False
            is_best = due and self._judge(record.valid or {})

        if epoch_over:
            self.epoch, self.round = self.epoch + 1, 0
            self.batches = None  # ends the processes that read ahead
        self.pending, self.whole, self.saved = None, True, False
        minutes = (time.monotonic() - self.saved_at) / 60
        late = minutes >= (training.checkpoint_minutes or math.inf)
        if epoch_over or late or self.step % training.checkpoint_every == 0 or self._over():
            self._save(is_best=is_best)
        return record

    def _validated(self, record: StepRecord, *, final: bool) -> StepRecord:
        """Score the averaged weights; if stopped meanwhile, the step's record stays pending."""
        assert self.valid_set is not None
        averaged = self.engine.ema.module
        result = validate(self.cfg, averaged, self.valid_set, self.accelerator, self.stop)
        if result is None:
            raise KeyboardInterrupt
        if self.log is not None:
            self.log.validation(record, result, final=final)
        return dataclasses.replace(record, valid=result.values)

    def _next_batch(self, round_: int) -> feed.Batch:
        if self.batches is None:
            self.batches = self.feed.read(self.epoch, round_)
        return self.feed.batch(next(self.batches), self.epoch, round_)

    def _make_step(self, attempt: Attempt) -> Outcome:
        seed = self.cfg.training.seed
        feed.seed_everything(seed, feed.Stream.STEP, self.step, self.rank)  # for dropout
        try:
            return self.engine.step(attempt.batches, stop=self.stop.requested)
        except Exception as error:
            if isinstance(error, DistError) or "gloo" in str(error):
                what = f"step {attempt.step}: another process of the run has gone ({reason(error)})"
                raise DiffbufError(f"{what}: --resume goes on from the last checkpoint") from error
            # A reader's death arrives as a signal: it is not the step's fault.
            known = self.feed.reader.death(error) or self.failures.raised(attempt, error)
            if known is error:
                raise
            raise known from error

    def _is_left_out(self, attempt: Attempt, outcome: Outcome) -> bool:
        """Return whether a step is left out as not finite; raise its error if it may not be."""
        error = self.failures.nonfinite(attempt, outcome)
        if error is None:
            return False
        most, so_far = self.cfg.training.max_skipped, self.bad_batches
        if self.cfg.training.on_nonfinite == "stop":
            raise error
        if so_far >= most:
            why = f"{so_far} batches were left out before, and training.max_skipped is {most}"
            raise NonFiniteError(f"{error}. {why}")
        self.bad_batches += 1
        warnings.warn(f"left out, {so_far + 1} of at most {most}: {error}", stacklevel=2)
        return True

    def _judge(self, values: dict[str, float]) -> bool:
        """Let a validation change the learning rate; return whether it is the best so far."""
        name = self.cfg.training.metric_for_scheduler
        score = values[name]
        if not math.isfinite(score):
            what = f"no validation clip has a finite {name}"
            warnings.warn(f"{what}: learning rate and early stopping wait", stacklevel=2)
            return False
        self.engine.count_validation(score)
        if self.best is None or (score < self.best if lower_is_better(name) else score > self.best):
            self.best, self.bad_validations = score, 0
            return True
        self.bad_validations += 1
        return False

    # Where the run stands.

    def _is_last(self, epoch_over: bool) -> bool:
        training = self.cfg.training
        enough = training.num_steps is not None and self.step >= training.num_steps
        return enough or (epoch_over and self.epoch + 1 >= training.num_epochs)

    def _over(self) -> bool:
        patience = self.cfg.training.early_stopping
        enough = patience is not None and self.bad_validations >= patience
        return enough or self._is_last(False) or self.epoch >= self.cfg.training.num_epochs

    def _isolated(self) -> AbstractContextManager[None]:
        return isolated(self.accelerator.device, deterministic=self.cfg.training.deterministic)

    # Its beginning, its checkpoints and its end.

    def _together(self, find: Callable[[], Any]) -> Any:
        """Return in all processes what the main one finds; raise what it raises."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = find()
            except DiffbufError as error:
                found[1] = error
        if self.processes > 1:
            broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _open(self, resume: bool | Literal["auto"], ending: ExitStack) -> dict[str, Any] | None:
        """Lock the results folder, and return the checkpoint to resume from."""
        lock = FolderLock(self.folder.path)
        lock.acquire()
        ending.callback(lock.release)
        if self.cfg.training.mirror is not None:
            self.mirror = Mirror(self.cfg.training.mirror, self.folder.path)
            if resume:
                self.mirror.fetch()
        if resume == "auto":
            resume = self.folder.last.is_file()
        if resume:
            return self.folder.load_last(self.cfg)
        self.folder.check_fresh()
        return None

    def begin(self, *, start_check_point: str | Path | None, progress: bool) -> None:
        """Load what there is to load, and save the starting point."""
        changed: dict[str, Any] = {}
        if self.state is not None:
            changed = self._load(self.state)
            self.state = None
        elif start_check_point is not None:
            weights = load_weights(start_check_point)
            for model in (self.engine.model, self.engine.ema.module):
                apply_weights(model, weights, start_check_point)
        if self.accelerator.is_main_process:
            self.folder.tidy()
            if not self.resumed:
                self._write(self.folder.last)  # a full disk fails now, and resuming always works
            self.folder.write_config(self.cfg)
            if not self._over():
                self.folder.truncate_history(self.step, validated=self.pending is None)
            self.log = RunLog(self.cfg, self.folder, self.step, self.total, progress)
            if self.why:
                self.log.say(f"memory format: {self.why}")
            if changed:
                self.log.write({"step": self.step, "changed": changed})
        self.whole = True

    def close(self) -> None:
        """Save the run's state if it is whole, and model/ if there is none; close the logs."""
        with self.stop.running():
            self.batches = None
            try:
                if self.whole and self.accelerator.is_main_process:
                    self._save_last()
            finally:
                if self.log is not None:
                    self.log.close()
                if self.mirror is not None:
                    self.mirror.close()
                if self.agreed:  # torchrun ends the others once one ends, saving or not
                    self.accelerator.wait_for_everyone()
                self.engine.close()

    def _save_last(self) -> None:
        if not self.engine.is_finite():
            text = f"weights are not finite: step {self.step} is not saved"
            warnings.warn(text, stacklevel=2)
            return
        if not self.saved:
            self._write(self.folder.last)
        if self.best is None and self.step:
            self.folder.export_model(self.engine.ema.module)
        if self.mirror is not None:
            self.mirror.update(self.step)

    def _save(self, *, is_best: bool) -> None:
        """Write the checkpoints that are due, or raise NonFiniteError for exploded weights."""
        if not self.engine.is_finite():
            self.whole = False
            what = f"weights are not finite after the update with lr {self.engine.lr:g}"
            fix = "lower training.lr or set training.grad_clip; the checkpoints are from before"
            raise NonFiniteError(f"step {self.step} (epoch {self.epoch}): {what}: {fix}")
        if self.accelerator.is_main_process:
            if is_best:
                self._write(self.folder.best)
                self.folder.export_model(self.engine.ema.module)
            self._write(self.folder.last)
            if self.mirror is not None:
                self.mirror.update(self.step)
        self.saved, self.saved_at = True, time.monotonic()

    def _write(self, path: Path) -> None:
        state: dict[str, Any] = {
            "version": diffbuf_lib.__version__,
            "config": self.cfg.to_dict(),
            "examples": min(self.round * self.plan.a_round, self.plan.examples),
            "processes": self.processes,
            "global_batch": self.plan.global_batch,
            "unit": self.plan.unit or self.plan.a_round,
            "pending": self.pending and self.pending.to_dict(),
            "memory_format": self.memory_format,
        }
        place = {name: getattr(self, name) for name in _PLACE}
        save_checkpoint(path, {**state, **place, **self.engine.state_dict()})

    def _load(self, state: dict[str, Any]) -> dict[str, Any]:
        """Load a checkpoint's state; return what changes, for the history."""
        changed = {**state["changed"]}
        before, now = state["global_batch"], self.plan.global_batch
        if before != now:
            changed["global batch"] = [before, now]
        try:
            self.engine.load_state_dict(state)
            for name in _PLACE:
                setattr(self, name, state[name])
            self.pending = state["pending"] and StepRecord(**state["pending"])
            if lr := changed.get("training.lr"):
                self.engine.scale_lr(lr[1] / lr[0])
            steps = -(-state["examples"] // now)
            self.round = min(steps * self.plan.accumulation, self.plan.rounds)
            if self.round == self.plan.rounds and self.pending is None:
                self.epoch, self.round = self.epoch + 1, 0  # a smaller set, or larger rounds
        except Exception as error:  # whatever torch raises for a state that does not fit
            what = f"checkpoint {self.folder.last} does not fit this model and optimizer"
            fix = f"take another one, such as best.pt ({reason(error)[:200]})"
            raise CheckpointError(f"{what}: {fix}") from error
        return changed


def make_plan(
    training: TrainingConfig, size: int, processes: int, state: dict[str, Any] | None
) -> feed.EpochPlan:
    """Cut epochs into batches; a resumed run keeps its global batch unless another is asked for.

    ConfigError if the processes cannot share it equally.
    """
    batch, rounds, unit = training.batch_size, training.accumulation_steps, training.global_batch
    total = training.global_batch or batch * rounds * processes
    if state is not None:
        before, kept_unit = state["global_batch"], state["unit"]
        asked = {"training.batch_size", "training.accumulation_steps", "training.global_batch"}
        total = total if asked & state["changed"].keys() else before
        unit = kept_unit if total == before else unit
    if total % processes:
        raise ConfigError(
            f"{processes} processes cannot share the run's global batch of {total} equally: start "
            "a number that divides it, or set another one with training.global_batch"
        )
    share = total // processes
    batch = max(n for n in range(1, min(batch, share) + 1) if share % n == 0)
    return feed.EpochPlan(size, batch, share // batch, processes, training.seed, unit)
