"""What the commands of `diffbuf` do, and their flags.

A command imports what it needs when it runs, so that its help needs no torch.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, dataclass_transform

import yaml
from tqdm import tqdm
from tyro.conf import Positional, UseAppendAction, arg

from diffbuf_lib.config import Config, build_config, describe_keys, load_config, read_tree
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.foreign import is_foreign, translate
from diffbuf_lib.launch import Request, submit, write_job
from diffbuf_lib.options import Job, Recipe, Scoring
from diffbuf_lib.pretrained import DEFAULT as DEFAULT_MODEL
from diffbuf_lib.registry import Registry

say = tqdm.write  # prints above a progress bar
COMMANDS = Registry("command")
_SET = arg(name="set", metavar="KEY.PATH=VALUE")
_HELP = arg(help="change config keys: --set a.b=1 c.d=2")
Overrides = Annotated[UseAppendAction[tuple[str, ...]], _SET, _HELP]


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Command:
    """A command: its fields are the flags, their comments the help, and a call runs it."""

    def __init_subclass__(cls, name: str = "") -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        if name:
            COMMANDS.add(name, cls)

    def __call__(self) -> None:
        """Run the command."""
        raise NotImplementedError

    def flags(self, *without: str) -> dict[str, Any]:
        """Return the flags by name, except `without`."""
        return {name: value for name, value in vars(self).items() if name not in without}


class Train(Command, name="train"):
    """Train a model."""

    config_path: Path  # YAML config of the experiment
    results_path: Path  # folder for checkpoints, logs and the model
    data_path: tuple[str, ...]  # training data: folders, or shards, also at s3://, gs://, https://
    valid_path: tuple[str, ...] = ()  # validation data; without it nothing is validated
    model_type: Literal["diffusion_buffer"] = "diffusion_buffer"  # the only one
    dataset_type: int = 1  # 1 sample_*/{mixture,vocals}.wav; 2 clean/, noisy/; 3 speech/, noise/
    device_ids: tuple[int, ...] = (0,)  # one GPU, or the CPU if there is none; torchrun for several
    num_workers: int | None = None  # processes that read files (training.num_workers)
    metrics: tuple[str, ...] | None = None  # scores of the validation (training.metrics)
    metric_for_scheduler: str | None = None  # the one that counts (training.metric_for_scheduler)
    start_check_point: Path | None = None  # checkpoint or model folder with the initial weights
    resume: bool = False  # continue the run in results_path, or training.mirror
    resume_if_any: bool = False  # the same, or start a run if there is none
    pre_valid: bool = False  # validate before the first step, too
    pin_memory: bool = False  # always on with a GPU; accepted for old commands
    wandb_key: str = ""  # WANDB_API_KEY; turns on the tracker wandb
    seed: int | None = None  # training.seed
    max_steps: int | None = None  # optimizer steps at most (training.num_steps)
    skip_doctor: bool = False  # start without checking machine, data and config first
    log_shapes: bool = False  # print shapes, types, devices and ranges of the first batch
    log_stats: int = 0  # steps between reports on every stage, also in TensorBoard
    on_nonfinite: Literal["stop", "skip"] | None = None  # at NaN or Inf (training.on_nonfinite)
    overfit_batches: int | None = None  # only the first N batches, to see if it learns at all
    find_batch_size: bool = False  # train with the largest batch that fits into memory
    overrides: Overrides = ()
    instead: ClassVar[dict[str, str]] = {  # for flags of Music-Source-Separation-Training
        r"--train_lora": "train all weights from --start_check_point, with a small training.lr",
        r"--use_\w+_loss": "choose one loss: --set training.loss=score (or data_prediction, ...)",
    }

    def __call__(self) -> None:
        # A scheduler may send several signals: the first stops the command, like Ctrl-C, and those
        # that arrive while it is stopping are ignored.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        asked = _Interrupt()
        before = [signal.signal(number, asked) for number in numbers]
        try:
            self._train()
        finally:
            for number, handler in zip(numbers, before, strict=True):
                if asked.armed:
                    signal.signal(number, handler)

    def _train(self) -> None:
        from diffbuf_lib.data import open_datasets
        from diffbuf_lib.diagnostics.checks_run import check_history
        from diffbuf_lib.training import saved_step, train

        cfg = self._config()
        if self.wandb_key:
            os.environ["WANDB_API_KEY"] = self.wandb_key
        kind, valid = self.dataset_type, self.valid_path
        train_set = open_datasets(kind, self.data_path, cfg, training=True)
        valid_set = open_datasets(kind, valid, cfg, training=False) if valid else None
        print(f"{len(train_set)} training clips, {len(valid_set or ())} validation clips")
        device = f"cuda:{self.device_ids[0]}" if self.device_ids else "auto"
        if self.find_batch_size:
            cfg = self._with_batch_size(cfg, train_set, device)
        main_process = os.environ.get("RANK", "0") == "0"  # torchrun numbers its processes
        if main_process and not self.skip_doctor:
            self._ask_doctor(cfg, train_set, valid_set, device=device)
        watched = main_process and (self.log_shapes or self.log_stats > 0)
        model = self._recorded(cfg) if watched else None
        records = train(
            cfg, train_set, valid_set, self.results_path, device=device, progress=True,
            resume="auto" if self.resume_if_any else self.resume, pre_valid=self.pre_valid,
            start_check_point=self.start_check_point, model=model,
        )  # fmt: skip
        try:
            with closing(records), closing(model) if model else nullcontext():
                for record in records:
                    if model:
                        model.report(record.step)
                    if record.valid:
                        scored = [k for k in record.valid if not k.endswith("_clips")]
                        scores = "  ".join(f"{k} {record.valid[k]:.3f}" for k in scored)
                        say(f"step {record.step}  epoch {record.epoch}  {scores}")
        except KeyboardInterrupt:
            if main_process:
                step = saved_step(self.results_path)
                what = "nothing is saved" if step is None else f"saved at step {step}"
                say(f"stopped; {what}; the same command with --resume continues from there")
            raise
        if main_process:
            for finding in check_history(self.results_path):
                say(f"doctor: {finding.line()}")
        say(f"model: {self.results_path / 'model'}")

    def _config(self) -> Config:
        """Return the config with the flags applied; `--set` takes precedence."""
        if (count := len(self.device_ids)) > 1:
            raise ConfigError(
                f"--device_ids names {count} GPUs, but one process uses one GPU: start "
                f"torchrun --nproc_per_node {count} train.py ... without --device_ids"
            )
        keys = ["num_workers", "metrics", "metric_for_scheduler", "seed", "on_nonfinite"]
        flags = {key: getattr(self, key) for key in [*keys, "overfit_batches"]}
        flags |= {"num_steps": self.max_steps}
        flags["trackers"] = ["tensorboard", "wandb"] if self.wandb_key else None
        given = [f"training.{k}={json.dumps(v)}" for k, v in flags.items() if v is not None]
        return load_config(self.config_path, [*given, *self.overrides])

    def _with_batch_size(self, cfg: Config, train_set: Any, device: str) -> Config:
        """Return the config with the largest batch that fits; a resumed run keeps its own."""
        from diffbuf_lib.training.memory import find_batch_size

        begun_with = self.results_path / "config.yaml"
        if self.resume and begun_with.is_file():
            size = load_config(begun_with).training.batch_size
        else:
            size = find_batch_size(cfg, train_set, device)
        say(f"batch_size {size} (training.batch_size was {cfg.training.batch_size})")
        return cfg.override(f"training.batch_size={size}")

    def _ask_doctor(self, *examined: Any, device: str) -> None:
        """Print warnings and errors, one per line; stop on an error."""
        from diffbuf_lib.diagnostics import examine, has_error

        findings = examine(*examined, device=device, results_path=self.results_path)
        for finding in findings:
            if finding.severity in ("error", "warning"):
                print(f"doctor: {finding.line()}", file=sys.stderr)
        if has_error(findings):
            print("doctor: not started; --skip_doctor starts it anyway", file=sys.stderr)
            sys.exit(1)

    def _recorded(self, cfg: Config) -> Any:
        """Return a model that reports on its batches."""
        from diffbuf_lib.diagnostics.watch import RecordingModel

        board = self.results_path / "tensorboard" / "stats"
        return RecordingModel(cfg, say, shapes=self.log_shapes, every=self.log_stats, board=board)


class _Interrupt:
    """A handler that raises KeyboardInterrupt once, or not at all after `disarm`."""

    def __init__(self) -> None:
        self.armed = True

    def disarm(self) -> None:
        """Leave it to the running training to stop."""
        self.armed = False

    def __call__(self, *_: object) -> None:
        if self.armed:
            self.disarm()
            raise KeyboardInterrupt


class Launch(Request, Command, name="launch"):
    """Write a job for Slurm, SkyPilot or torchrun that trains, and resumes where it stopped."""

    kind: Positional[Literal["slurm", "skypilot", "torchrun"]]  # what starts the job
    config_path: Positional[Path]  # YAML config of the experiment
    data_path: tuple[str, ...]  # training data, as in train
    results_path: Path  # folder for the job, checkpoints, logs and the model
    train: str = ""  # further flags of train, in quotes
    submit: bool = False  # submit the job at once
    overrides: Overrides = ()

    def __call__(self) -> None:
        job = write_job(**self.flags("submit", "train"), train=shlex.split(self.train))
        print(job)
        if self.submit:
            submit(self.kind, job)


class Doctor(Command, name="doctor"):
    """Check machine, data, config and model before training; exit status 1 on an error."""

    config_path: Path  # YAML config of the experiment
    data_path: tuple[str, ...]  # training data, as in train
    valid_path: tuple[str, ...] = ()  # validation data
    dataset_type: int = 1  # as in train
    results_path: Path | None = None  # where the run will write; default: the current folder
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    json: bool = False  # print JSON instead of a table
    overrides: Overrides = ()

    def __call__(self) -> None:
        from diffbuf_lib.diagnostics import examine_paths, has_error
        from diffbuf_lib.diagnostics.findings import render, to_json

        findings = examine_paths(**self.flags("json"))
        if self.json:
            print(to_json(findings))
        else:
            width = min(shutil.get_terminal_size((100, 24)).columns, 120)
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            print(render(findings, colour=colour, width=width))
        if has_error(findings):
            sys.exit(1)


class Rehearsing(Command):
    """What `lr-find` and `profile` have in common."""

    config_path: Path  # YAML config of the experiment
    data_path: tuple[str, ...]  # training data, as in train
    dataset_type: int = 1  # as in train
    start_check_point: Path | None = None  # checkpoint or model folder with the initial weights
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    overrides: Overrides = ()

    def opened(self) -> tuple[Any, ...]:
        """Return the config, training set and device of a rehearsal."""
        from diffbuf_lib.data import open_datasets

        cfg = load_config(self.config_path, self.overrides)
        train_set = open_datasets(self.dataset_type, self.data_path, cfg, training=True)
        return cfg, train_set, self.device


class LrFind(Rehearsing, name="lr-find"):
    """Propose a learning rate: try a range of them within at most one epoch, and plot the loss."""

    output: Annotated[Path, arg(aliases=["-o"])] = Path("lr-find.png")  # the only file it writes
    steps: int = 100  # steps at most, within one epoch

    def __call__(self) -> None:
        from diffbuf_lib.figures import lr_range
        from diffbuf_lib.training.rehearsal import find_lr

        cfg, *rest = self.opened()
        bar = partial(tqdm, desc="learning rates", unit="step")
        found = find_lr(
            cfg, *rest, steps=self.steps, start_check_point=self.start_check_point, progress=bar
        )
        lr_range(found.lrs, found.losses, found.proposed).savefig(self.output)
        best, asked = found.lrs[found.lowest], cfg.training.lr
        print(f"{cfg.training.optimizer}: the loss is lowest at {best:.1e}, and worse above")
        if found.proposed is None:
            print("the loss does not fall: see train.py --overfit_batches, and diffbuf doctor")
        else:
            print(f"it falls fastest at --set training.lr={found.proposed:.1e} (now {asked:.1e})")
        print(self.output)


class Profile(Rehearsing, name="profile"):
    """Show where a training step's time goes, and which key to change."""

    valid_path: tuple[str, ...] = ()  # validation data; without it validation is left out
    steps: int = 20  # steps to measure, after three others
    trace: Path | None = None  # file for torch's trace (.json), for ui.perfetto.dev

    def __call__(self) -> None:
        from diffbuf_lib.data import open_datasets
        from diffbuf_lib.training.timing import time_steps

        cfg, *rest = self.opened()
        paths, valid = self.valid_path, None
        if paths:
            valid = open_datasets(self.dataset_type, paths, cfg, training=False)
        options = self.flags(*Rehearsing.__dataclass_fields__, "valid_path")
        timing = time_steps(
            cfg, *rest, valid_set=valid, start_check_point=self.start_check_point, **options
        )
        print(f"{timing}\n\n{timing.verdict[0]}")


class Replay(Command, name="replay"):
    """Repeat a failed training step, module by module up to the first bad value.

    Exit status 0 if it fails at the same place again, 1 if not.
    """

    capsule_dir: Positional[Path]  # a capsule_<step> folder of training's results folder
    device: str = "cpu"  # cpu, cuda or cuda:N

    def __call__(self) -> None:
        from diffbuf_lib.diagnostics.capsule import Capsule

        capsule = Capsule.load(self.capsule_dir)
        record = capsule.record
        print(f"{self.capsule_dir}: step {record.step} (epoch {record.epoch}) on {record.device}")
        print(record.error.get("message", ""))
        result = capsule.replay(self.device)
        print(result)
        if not result.reproduced:
            sys.exit(1)


class Enhance(Command, name="enhance"):
    """Enhance a file, or every file below a folder that libsndfile reads, as a stream.

    In a folder, existing outputs are kept, and bad files are listed at the end.
    """

    source: Positional[Path]  # file or folder, of any sample rate and length
    output: Annotated[Path, arg(aliases=["-o"])]  # file (.wav or .flac) or folder
    model: str = DEFAULT_MODEL  # folder of a trained model, a run's folder, or a name
    channels: Literal["mono", "keep"] = "mono"  # average them, or enhance each by itself
    repair: bool = False  # take NaN and Inf samples as zeros instead of refusing the file
    overwrite: bool = False  # make existing outputs again
    seed: int = 0  # of the diffusion noise
    device: str = "auto"  # auto, cpu or cuda
    backend: Literal["torch", "onnx"] = "torch"  # onnx: faster on a CPU, for a block_causal model

    def __call__(self) -> None:
        from diffbuf_lib.enhance import FilesFailedError, enhance_path
        from diffbuf_lib.model import load_model

        model = load_model(self.model, self.device)
        options = self.flags("source", "output", "model", "device")
        try:
            for _, written in enhance_path(model, self.source, self.output, **options):
                print(written, flush=True)
        except FilesFailedError as failed:
            print(failed, file=sys.stderr)
            sys.exit(1)


class Stream(Command, name="stream"):
    """Enhance a stream hop by hop, and report on stderr whether this machine keeps up.

    A file, the microphone, or a pipe: WAV or raw s16le PCM on stdin, raw s16le on stdout.
    """

    source: Positional[Path] = Path("-")  # file of the model's sample rate; - for stdin
    output: Positional[Path] = Path("-")  # .wav or .flac file; - for stdout
    model: str = DEFAULT_MODEL  # folder of a trained model, a run's folder, or a name
    realtime: bool = False  # feed a file at its own pace
    rate: int | None = None  # Hz, of raw PCM on stdin; default: the model's, others are refused
    channels: int = 1  # of raw PCM on stdin
    repair: bool = False  # take NaN and Inf samples as zeros instead of refusing the file
    delay: int | None = None  # output delay, 1 to buffer_size frames (data prediction)
    threads: int | None = None  # of torch; default: 1 or torch's own number, by a short test
    compiled: bool = False  # compile a block_causal model: a minute to start, then faster
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: for the network of a block_causal model
    seed: int = 0  # of the diffusion noise
    device: Literal["file", "mic"] = "file"  # mic: microphone to headphones, until Ctrl-C
    backend: Literal["torch", "onnx", "auto"] = "torch"  # auto: the faster in a short test

    def __call__(self) -> None:
        import torch

        from diffbuf_lib.live import choose_backend, choose_threads, run_microphone, stream_path
        from diffbuf_lib.model import load_model
        from diffbuf_lib.streaming import OnlineEnhancer

        for flag in ("threads", "rate", "channels"):
            if (value := getattr(self, flag)) is not None and value < 1:
                raise ConfigError(f"--{flag} {value}: give at least 1")
        model = load_model(self.model, "cpu")
        backend = self.backend
        if backend == "auto":
            backend, why = choose_backend(model, self.delay)
            print(f"backend: {backend}{why and f' ({why})'}", file=sys.stderr)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        else:
            print(f"threads: {choose_threads(model, self.delay, backend)}", file=sys.stderr)
        enhancer = OnlineEnhancer(
            model, seed=self.seed, delay=self.delay, compiled=self.compiled,
            precision=self.precision, backend=backend,
        )  # fmt: skip
        if self.device == "mic":
            report = run_microphone(enhancer)
        else:
            report = stream_path(
                enhancer, self.source, self.output, realtime=self.realtime, rate=self.rate,
                channels=self.channels, repair=self.repair,
            )  # fmt: skip
        print(report, file=sys.stderr)


class Export(Command, name="export"):
    """Export a model's hop as a graph, for ONNX with a script that streams it without torch."""

    model: Positional[str]  # folder of a trained model, a run's folder, or a name
    output: Annotated[Path, arg(aliases=["-o"])]  # folder
    precision: Literal["fp32", "fp16", "int8"] = "fp32"  # of the graph; its error is printed
    format: Literal["onnx", "executorch"] = "onnx"  # of the graph's runtime
    delay: int | None = None  # output delay, 1 to buffer_size frames (data prediction)

    def __call__(self) -> None:
        from diffbuf_lib.export import export_model
        from diffbuf_lib.model import load_model

        model = load_model(self.model, "cpu")
        print(export_model(model, self.output, **self.flags("model", "output")))


class ServeBench(Command, name="serve-bench"):
    """Count the streams that one core can run in one call with every deadline met."""

    model: str = DEFAULT_MODEL  # folder of a trained model, a run's folder, or a name
    backends: tuple[Literal["torch", "onnx"], ...] = ("torch", "onnx")  # backends to time
    hops: int = 125  # hops to time

    def __call__(self) -> None:
        import torch

        from diffbuf_lib.live import streams_in_time
        from diffbuf_lib.model import load_model

        model = load_model(self.model, "cpu")
        torch.set_num_threads(1)
        print(f"{torch.backends.cpu.get_cpu_capability()}, one thread, {self.hops} hops")
        for backend in self.backends:
            streams, report = streams_in_time(model, backend, self.hops)
            print(
                f"{backend:6} {streams:4} streams in time; p50 {report.quantile(0.5):.1f}, worst "
                f"{report.quantile(1):.1f} of {report.hop_ms:.1f} ms"
            )


class Evaluate(Job, Command, name="evaluate"):
    """Score a model on a dataset, beside the noisy input and other methods."""

    results_path: Path | None = None  # scores, report.html; a stopped evaluation resumes there
    part: str = "1/1"  # share of a job array: 2/8 scores the second of eight shares
    processes: int | None = None  # worker processes; default: this machine's cores
    #: change keys of the model's config: --set diffusion_buffer.buffer_size=10
    overrides: Annotated[UseAppendAction[tuple[str, ...]], _SET] = ()

    def __call__(self) -> None:
        from diffbuf_lib.evaluation import evaluate_part
        from diffbuf_lib.evaluation.page import overview

        with tempfile.TemporaryDirectory() as temporary:
            job = Job(**self.flags("results_path", "part", "processes"))
            found = evaluate_part(
                job, self.results_path or temporary, self.part,
                processes=self.processes, page=self.results_path is not None, progress=True,
            )  # fmt: skip
        if found is None:
            print(f"part {self.part} is scored: the last part writes the results")
            return
        print(overview(found.summary, found.timing))
        if self.results_path is not None:
            print(f"\n{self.results_path / 'report.html'}")


class Compare(Command, name="compare"):
    """Compare two evaluations of the same clips, paired clip by clip."""

    a: Positional[Path]  # results folder of an evaluation
    b: Positional[Path]  # another; differences are b - a
    method: str = "diffbuf"  # noisy, a baseline or diffbuf
    seed: int = 0  # of the bootstrap intervals

    def __call__(self) -> None:
        from diffbuf_lib.evaluation import compare_folders
        from diffbuf_lib.evaluation.page import differences

        found = compare_folders(**self.flags())
        print(f"a: {self.a}\nb: {self.b}")
        print(f"{self.method}; 95 % intervals of the paired difference in brackets")
        print(differences(found))


class Sweep(Scoring, Command, name="sweep"):
    """Plot quality against latency, or train a grid of small runs: sweep.csv and sweep.png."""

    models: tuple[str, ...] = ()  # folders of trained models, runs' folders, or names
    results_path: Path  # folder for all output; a stopped sweep resumes when started again
    #: none: models as they were trained; auto: delay for data prediction, else buffer_size
    vary: Literal["auto", "buffer_size", "delay", "t_max", "none"] = "auto"
    #: values to try; default: buffer_size 5 10 20 30 60, delay 1 5 10 20 30 60 up to B, t_max 0.3
    #: 0.5 0.7 0.8 0.9
    values: tuple[float, ...] = ()
    metrics: tuple[str, ...] = ("pesq", "estoi", "si_sdr")  # as in evaluate
    train: Path | None = None  # config of runs to train first, then score as they were trained
    train_path: tuple[str, ...] = ()  # training data of these runs; data_path is for validation
    #: the runs' config keys, each with its values: --over training.lr=1e-3,3e-3
    over: UseAppendAction[tuple[str, ...]] = ()
    part: str = "1/1"  # share of a job array: 2/8 trains the second of eight shares
    processes: int | None = None  # worker processes for scoring; default: this machine's cores

    def __call__(self) -> None:
        from diffbuf_lib.evaluation.sweep import overview, run_sweep, train_grid

        models = self.models
        if bool(models) == bool(self.train) or bool(self.train) != bool(self.train_path):
            raise ConfigError("give --models, or --train with --train_path")
        if (self.over or self.part != "1/1") if models else (self.values or self.vary != "auto"):
            raise ConfigError("--over, --part go with --train, and --vary, --values with --models")
        shared = {name: getattr(self, name) for name in (*Scoring.__dataclass_fields__, "metrics")}
        job = Job(model=models[0] if models else "", **shared)
        if self.train:
            found = train_grid(
                load_config(self.train), self.over, self.train_path, job, self.results_path,
                part=self.part, progress=True, say=say,
            )  # fmt: skip
            if found is None:
                print(f"part {self.part} is trained: the last part writes the results")
                return
            models = tuple(found)
        points = run_sweep(
            models, job, self.results_path, vary="grid" if self.train else self.vary,
            values=self.values, processes=self.processes, progress=True, say=say,
        )  # fmt: skip
        print(overview(points))
        print(self.results_path / "sweep.png")


class Push(Command, name="push"):
    """Send a trained model to the Hugging Face hub: weights, config, and a card with its scores."""

    source: Positional[str]  # folder of a trained model, a run's folder, or a name
    name: Positional[str]  # owner/name on the hub
    evaluation: Path | None = None  # results folder of `diffbuf evaluate`, for the card's scores
    private: bool = False  # visible only to its owner
    dry_run: bool = False  # send nothing; write what would be sent
    output: Path = Path("results/push")  # where --dry_run writes it

    def __call__(self) -> None:
        from diffbuf_lib.evaluation.publish import send, write_model
        from diffbuf_lib.model import load_model

        model = load_model(self.source, "cpu")
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.output if self.dry_run else Path(temporary)
            write_model(model, self.name, folder, self.evaluation)
            for path in sorted(folder.iterdir()):
                print(f"{path.stat().st_size:12,} bytes  {path.name}")
            print(folder if self.dry_run else send(folder, self.name, private=self.private))


class Demo(Command, name="demo"):
    """Build the demo set, train a little on it, enhance held-out clips, write a report."""

    config_path: Path = Path("configs/demo.yaml")  # what to train
    data_path: Path = Path("data/DN-LM-demo")  # where the demo set is, or will be made
    results_path: Path = Path("results/demo")  # where everything else goes
    overrides: Overrides = ()

    def __call__(self) -> None:
        run = _recipe("demo.run").run_demo
        cfg = load_config(self.config_path, self.overrides)
        print(run(cfg, self.data_path, self.results_path, say=say, progress=True))


class DemoModel(Command, name="demo-model"):
    """Make data from Debian's voices and train diffbuf/cpu-demo on it: hours on a CPU."""

    config_path: Path = Path("configs/demo_model.yaml")  # what to train
    data_path: Path = Path("data/pretraining")  # where the data is, or will be made
    results_path: Path = Path("results/demo_model")  # the runs; an interrupted one resumes
    overrides: Overrides = ()

    def __call__(self) -> None:
        run = _recipe("cpu_demo.pretraining").run_pretraining
        cfg = load_config(self.config_path, self.overrides)
        print(run(cfg, self.data_path, self.results_path, say=say, progress=True))


class DataDemo(Command, name="data demo"):
    """Make the embedded demo set: synthetic speech under synthetic drones, without a network."""

    out_path: Positional[Path] = Path("data/DN-LM-demo")  # folder to make
    train: int = 192  # training clips of 1 s
    valid: int = 12  # validation clips of 1 s
    seed: int = 0  # of all random draws

    def __call__(self) -> None:
        build_demo = _recipe("demo.demo_set").build_demo
        print(build_demo(self.out_path, **self.flags("out_path"), progress=True))


class DataBuild(Recipe, Command, name="data build"):
    """Make DN-LM from a LibriSpeech-shaped tree and a folder of drone noise.

    The output bytes do not depend on the number of processes; rerun to resume a stopped build.
    """

    speech_path: Path  # speech, .wav or .flac at any depth, one folder per speaker
    noise_path: Path  # noise, .wav or .flac
    out_path: Path  # folder to make
    part: str = "1/1"  # share of a job array: 2/8 makes the second of eight shares
    shards: int = 0  # write shards of this many clips, as `data pack` does, not folders
    processes: int | None = None  # worker processes; default: this machine's cores

    def __call__(self) -> None:
        from diffbuf_lib.data import build_dnlm
        from diffbuf_lib.data.pack import build_shards

        paths = self.speech_path, self.noise_path, self.out_path
        options = self.flags("speech_path", "noise_path", "out_path", "shards")
        build = partial(build_shards, clips=self.shards) if self.shards else build_dnlm
        print(build(*paths, **options, progress=True))


class DataPack(Command, name="data pack"):
    """Write a folder of pairs, or its splits, as shards: tar files of FLAC and an index."""

    source: Positional[Path]  # folder of dataset_type 1 or 2, or one of train/, valid/, test/
    out_path: Annotated[Path, arg(aliases=["-o"])]  # folder to make
    clips: int = 1000  # clips per shard
    part: str = "1/1"  # share of a job array: 2/8 writes the second of eight shares
    processes: int | None = None  # worker processes; default: this machine's cores

    def __call__(self) -> None:
        from diffbuf_lib.data.pack import pack_folder

        print(pack_folder(**self.flags(), progress=True))


class DataResample(Command, name="data resample"):
    """Copy a dataset folder of any layout at another sample rate; rerun to resume the copy."""

    source: Positional[Path]  # folder with audio at any depth
    out_path: Positional[Path]  # folder to make; audio becomes .wav of 32-bit floats
    rate: int = 16000  # Hz

    def __call__(self) -> None:
        from diffbuf_lib.data.audio import resample_folder

        print(resample_folder(self.source, self.out_path, self.rate, progress=True))


class DataDownload(Command, name="data download"):
    """Download a speech corpus; needs the internet."""

    name: Positional[Literal["librispeech"]] = "librispeech"  # the only one
    out_path: Path = Path("data/LibriSpeech")  # folder to make
    subset: str = "train-clean-100"  # or dev-clean, test-clean, train-clean-360, ...

    def __call__(self) -> None:
        from diffbuf_lib.data import download_librispeech

        print(download_librispeech(self.out_path, self.subset))


class PrintConfig(Command, name="config"):
    """Print a config with every default filled in; without a file, every key and its meaning."""

    config_path: Positional[Path | None] = None  # YAML config
    overrides: Overrides = ()

    def __call__(self) -> None:
        if self.config_path is not None:
            print(load_config(self.config_path, self.overrides).to_yaml(), end="")
            return
        for key, default, description in describe_keys():
            print(f"{key} = {default}\n    {description}")


class ImportConfig(Command, name="config import"):
    """Convert a config of Music-Source-Separation-Training, with comments on what changed."""

    config_path: Positional[Path]  # their YAML; every command also takes it as it is
    output: Annotated[Path, arg(aliases=["-o"])]  # file to write

    def __call__(self) -> None:
        tree, source = read_tree(self.config_path), str(self.config_path)
        if not is_foreign(tree):
            raise ConfigError(f"{source} is not a config of another project: use it as it is")
        ours, table = translate(tree, {key for key, *_ in describe_keys()})
        build_config(ours, source=source)
        comment = "".join(f"# {line}\n" for line in [f"From {source}", *table.splitlines()])
        with _new(self.output):
            self.output.write_text(comment + yaml.safe_dump(ours, sort_keys=False), "utf-8")
        print(f"{table}\n{self.output}")


class Import(Command, name="import"):
    """Convert a checkpoint of the method's authors (sp-uhh/Diffusion-Buffer) to a model folder."""

    checkpoint: Positional[Path]  # their .ckpt; nothing in it is executed
    output: Annotated[Path, arg(aliases=["-o"])]  # folder to make, for --model and the like
    raw: bool = False  # use the weights as training left them, not the averaged ones

    def __call__(self) -> None:
        from diffbuf_lib.authors import import_checkpoint

        with _new(self.output):
            imported = import_checkpoint(self.checkpoint, raw=self.raw)
            imported.model.save_pretrained(self.output)
        print("\n".join([*imported.notes, str(self.output)]))


def _recipe(name: str) -> Any:
    """Import a module of recipes/, which only a checkout has."""
    root = Path(__file__).parents[1]
    if not (root / "recipes" / "demo" / "drone.py").is_file():
        raise ConfigError("this needs recipes/, which only a checkout has: pip install -e .")
    sys.path.insert(0, str(root))
    return import_module(f"recipes.{name}")


@contextmanager
def _new(output: Path) -> Iterator[None]:
    """Guard the writing of a file or folder that must not exist yet."""
    if output.exists():
        raise ConfigError(f"{output} already exists: choose another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror})") from error
