"""The command line: `diffbuf train|enhance|stream|evaluate|doctor|replay|...`, and train.py."""

from __future__ import annotations

import csv
import faulthandler
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from diffbuf_lib.config import Config, describe_keys, load_config
from diffbuf_lib.errors import ConfigError, DiffbufError

Overrides = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(name="set", metavar="KEY.PATH=VALUE", help="change a config key; may be repeated"),
]


def main(args: Sequence[str] | None = None) -> None:
    """Run `diffbuf ...`."""
    data = tyro.extras.SubcommandApp()
    for name, function in _DATA_COMMANDS.items():
        data.command(name=name)(function)
    commands: dict[str, Callable[..., None]] = {
        "doctor": doctor_command,
        "train": train_command,
        "replay": replay_command,
        "enhance": enhance_command,
        "stream": stream_command,
        "evaluate": evaluate_command,
        "demo": demo_command,
        "config": config_command,
    }
    argv = list(sys.argv[1:] if args is None else args)
    if argv[:1] == ["data"] and argv[1:]:
        run(lambda: data.cli(args=argv[1:], prog="diffbuf data", use_underscores=True))
        return
    app = tyro.extras.SubcommandApp()
    for name, function in commands.items():
        app.command(name=name)(function)
    app.command(name="data")(data_command)
    run(lambda: app.cli(args=argv, prog="diffbuf", use_underscores=True))


def train_main() -> None:
    """Run `python train.py ...`."""
    run(lambda: tyro.cli(train_command, prog="train.py", use_underscores=True))


def run(command: Callable[[], Any]) -> None:
    """Run a command; errors of ours are one line and exit status 2, Ctrl-C is 130."""
    faulthandler.enable()
    warnings.showwarning = _show_warning
    try:
        command()
    except DiffbufError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def train_command(
    config_path: Path,
    results_path: Path,
    data_path: Path,
    valid_path: Path | None = None,
    model_type: str = "diffusion_buffer",
    dataset_type: int = 1,
    device_ids: tuple[int, ...] = (0,),
    num_workers: int | None = None,
    metrics: tuple[str, ...] | None = None,
    metric_for_scheduler: str | None = None,
    start_check_point: Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    max_steps: int | None = None,
    skip_doctor: bool = False,
    log_shapes: bool = False,
    log_stats: int = 0,
    on_nonfinite: Literal["stop", "skip"] | None = None,
    find_batch_size: bool = False,
    overrides: Overrides = (),
) -> None:
    """Train a model.

    Args:
        config_path: YAML config of the experiment.
        results_path: folder for checkpoints, logs and the model.
        data_path: training data.
        valid_path: validation data; without it nothing is validated.
        model_type: diffusion_buffer, the only one.
        dataset_type: 1 sample_*/{mixture,vocals}.wav; 2 clean/ and noisy/; 3 speech/ and noise/,
            mixed on the fly.
        device_ids: one GPU; for several start with torchrun. Without a GPU the CPU is used.
        num_workers: processes that read files (training.num_workers).
        metrics: scores of the validation: si_sdr sdr pesq estoi (training.metrics).
        metric_for_scheduler: the one that counts (training.metric_for_scheduler).
        start_check_point: a checkpoint file or model folder to take the first weights from.
        resume: go on with the run in results_path.
        seed: training.seed.
        max_steps: optimizer steps at most (training.num_steps).
        skip_doctor: start without looking at machine, data and config first.
        log_shapes: print shapes, types, devices and ranges of the first batch.
        log_stats: print the numbers of every stage each so many steps, and send them to
            TensorBoard; 0: never.
        on_nonfinite: stop at a NaN or Inf loss or gradient, or skip its batch
            (training.on_nonfinite).
        find_batch_size: train with the largest batch that fits into the memory, instead of
            training.batch_size.
        overrides: config keys.
    """
    from diffbuf_lib.data import open_dataset
    from diffbuf_lib.training import train

    if model_type != "diffusion_buffer":
        raise ConfigError(f"--model_type {model_type} is unknown: diffusion_buffer is the only one")
    if len(device_ids) > 1:
        raise ConfigError(
            f"--device_ids names {len(device_ids)} GPUs, and one process drives one: start "
            f"torchrun --nproc_per_node {len(device_ids)} train.py ... without --device_ids"
        )
    flags = {
        "num_workers": num_workers,
        "metrics": list(metrics) if metrics else None,
        "metric_for_scheduler": metric_for_scheduler,
        "seed": seed,
        "num_steps": max_steps,
        "on_nonfinite": on_nonfinite,
    }
    given = [f"training.{key}={value}" for key, value in flags.items() if value is not None]
    cfg = load_config(config_path, [*given, *overrides])
    train_set = open_dataset(dataset_type, data_path, cfg, training=True)
    valid_set = open_dataset(dataset_type, valid_path, cfg, training=False) if valid_path else None

    print(f"{len(train_set)} training clips, {len(valid_set) if valid_set else 0} validation clips")
    device = f"cuda:{device_ids[0]}" if device_ids else "auto"
    if find_batch_size:
        cfg = _with_batch_size(cfg, train_set, device, results_path if resume else None)
    main_process = os.environ.get("RANK", "0") == "0"  # torchrun numbers its processes
    if main_process and not skip_doctor:
        _consult_doctor(cfg, train_set, valid_set, device, results_path)
    recorder, model = None, None
    if main_process and (log_shapes or log_stats > 0):
        from diffbuf_lib.diagnostics.recording import RecordingModel, StageRecorder

        board = results_path / "tensorboard" / "stats"
        recorder = StageRecorder(
            cfg, _say, shapes=log_shapes, every=log_stats, board=board, resumed=resume
        )
        model = RecordingModel(cfg, recorder)
    records = train(
        cfg,
        train_set,
        valid_set,
        results_path,
        resume=resume,
        start_check_point=start_check_point,
        device=device,
        progress=True,
        model=model,
    )
    try:
        with closing(records):
            for record in records:
                if recorder is not None:
                    recorder.step(record.step)
                if record.valid:
                    _say(f"step {record.step}  epoch {record.epoch}  {_scores(record.valid)}")
    except KeyboardInterrupt:
        _say(f"stopped; the same command with --resume goes on from {results_path}")
        raise
    finally:
        if recorder is not None:
            recorder.close()
    _say(f"model: {results_path / 'model'}")


def replay_command(capsule_dir: Positional[Path], device: str = "cpu") -> None:
    """Make a failed training step again, module by module to the first bad value.

    Exit status 0 if it fails at the same place as then, 1 if not.

    Args:
        capsule_dir: a capsule_<step> folder, which training wrote into its results folder.
        device: cpu, cuda or cuda:N.
    """
    from diffbuf_lib.diagnostics.capsule import Capsule

    capsule = Capsule.load(capsule_dir)
    record = capsule.record
    print(f"{capsule_dir}: step {record.step} (epoch {record.epoch}) on {record.device}")
    print(record.error.get("message", ""))
    result = capsule.replay(device)
    print(result)
    if not result.reproduced:
        sys.exit(1)


def enhance_command(
    source: Positional[Path],
    output: Annotated[Path, arg(aliases=["-o"])],
    model: Path,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Enhance a file, or every .wav and .flac below a folder, as a stream.

    Args:
        source: file or folder, of any sample rate and length.
        output: file or folder.
        model: folder of a trained model, such as results/demo/model.
        seed: of the diffusion noise.
        device: auto, cpu or cuda.
    """
    from diffbuf_lib.enhancement import enhance_path

    for _, written in enhance_path(_load_model(model, device), source, output, seed=seed):
        print(written)


def stream_command(
    source: Positional[Path] = Path("-"),
    output: Positional[Path] = Path("-"),
    *,
    model: Path,
    realtime: bool = False,
    delay: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    device: Literal["file", "mic"] = "file",
) -> None:
    """Enhance a stream hop by hop, and report on stderr whether this machine keeps up.

    A file, the microphone, or raw s16le mono PCM of the model's rate on stdin and stdout.

    Args:
        source: file of the model's sample rate; - for stdin.
        output: .wav or .flac file; - for stdout.
        model: folder of a trained model.
        realtime: feed a file at its own pace.
        delay: frames from a sample to its output, 1 to buffer_size, of a data-prediction model.
        threads: CPU threads of torch; default: its own choice.
        seed: of the diffusion noise.
        device: file (or pipe), or mic: from the microphone to the headphones until Ctrl-C.
    """
    import torch

    from diffbuf_lib.live_io import run_microphone, stream_path
    from diffbuf_lib.streaming import OnlineEnhancer

    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads {threads}: give at least 1")
        torch.set_num_threads(threads)
    with redirect_stdout(sys.stderr):  # huggingface_hub prints, and stdout may be the sound
        loaded = _load_model(model, "cpu")
    enhancer = OnlineEnhancer(loaded, seed=seed, delay=delay)
    if device == "mic":
        report = run_microphone(enhancer)
    else:
        report = stream_path(enhancer, source, output, realtime=realtime)
    print(report, file=sys.stderr)


def evaluate_command(
    model: Path,
    data_path: Path,
    dataset_type: int = 1,
    metrics: tuple[str, ...] = ("si_sdr",),
    seconds: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    csv_path: Path | None = None,
) -> None:
    """Score a model on a dataset, beside the noisy input.

    Args:
        model: folder of a trained model.
        data_path: dataset folder.
        dataset_type: as in train.
        metrics: si_sdr sdr pesq estoi.
        seconds: length of a clip; default: the model's chunk_size.
        limit: only the first clips.
        seed: of the diffusion noise.
        device: auto, cpu or cuda.
        csv_path: also write every clip's scores here.
    """
    from diffbuf_lib.data import open_dataset
    from diffbuf_lib.evaluation import evaluate, summary

    loaded = _load_model(model, device)
    cfg = loaded.cfg
    if seconds is not None:
        cfg = cfg.override(f"audio.chunk_size={round(seconds * cfg.audio.sample_rate)}")
    dataset = open_dataset(dataset_type, data_path, cfg, training=False)
    clips = list(evaluate(loaded, dataset, metrics, seed=seed, limit=limit))
    print(f"{'metric':10} {'noisy':>8} {'enhanced':>9} {'gain':>8}  clips")
    for row in summary(clips, metrics):
        print(
            f"{row.metric:10} {row.noisy:8.3f} {row.enhanced:9.3f} {row.gain:+8.3f}  "
            f"{row.scored} of {row.clips}"
        )
    if csv_path is not None:
        with open(csv_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["clip", *(f"{m}_{k}" for m in metrics for k in ("noisy", "enhanced"))])
            for clip in clips:
                scores = (v for m in metrics for v in (clip.noisy[m], clip.enhanced[m]))
                writer.writerow([clip.name, *("" if math.isnan(v) else f"{v:.4f}" for v in scores)])


def demo_command(
    config_path: Path = Path("configs/demo.yaml"),
    data_path: Path = Path("data/DN-LM-demo"),
    results_path: Path = Path("results/demo"),
    overrides: Overrides = (),
) -> None:
    """Build the demo set, train on it, enhance held-out clips, write a report.

    Args:
        config_path: what to train.
        data_path: where the demo set is, or will be made.
        results_path: where everything else goes.
        overrides: config keys.
    """
    from diffbuf_lib.demo import run_demo

    cfg = load_config(config_path, overrides)
    print(run_demo(cfg, data_path, results_path, say=_say, progress=True))


def config_command(config_path: Positional[Path | None] = None, overrides: Overrides = ()) -> None:
    """Print a config with every default filled in; without a file, every key and its meaning.

    Args:
        config_path: YAML config.
        overrides: config keys.
    """
    if config_path is not None:
        print(load_config(config_path, overrides).to_yaml(), end="")
        return
    for key, default, description in describe_keys():
        print(f"{key} = {default}\n    {description}")


def doctor_command(
    config_path: Path,
    data_path: Path,
    valid_path: Path | None = None,
    dataset_type: int = 1,
    results_path: Path | None = None,
    device: str = "auto",
    json: bool = False,
    overrides: Overrides = (),
) -> None:
    """Look at machine, data, config and model before training; exit status 1 on an error.

    Args:
        config_path: YAML config of the experiment.
        data_path: training data.
        valid_path: validation data.
        dataset_type: as in train.
        results_path: where the run will write; default: the current folder's disk is looked at.
        device: auto, cpu, cuda or cuda:N.
        json: print JSON for machines.
        overrides: config keys.
    """
    import shutil

    from diffbuf_lib.diagnostics.doctor import examine_paths, has_error
    from diffbuf_lib.diagnostics.findings import render, to_json

    findings = examine_paths(
        config_path, data_path, valid_path, dataset_type=dataset_type, overrides=overrides,
        device=device, results_path=results_path,
    )  # fmt: skip
    if json:
        print(to_json(findings))
    else:
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(render(findings, colour=colour, width=width))
    if has_error(findings):
        sys.exit(1)


def data_command() -> None:
    """Make datasets: diffbuf data demo|build|download."""
    raise ConfigError(
        "give a command: diffbuf data demo, diffbuf data build or diffbuf data download"
    )


def data_demo_command(
    out_path: Positional[Path] = Path("data/DN-LM-demo"),
    train: int = 192,
    valid: int = 12,
    seed: int = 0,
) -> None:
    """Make the embedded demo set: synthetic speech under synthetic drones, without a network.

    Args:
        out_path: folder to make.
        train: training clips of 1 s.
        valid: validation clips of 1 s.
        seed: of everything drawn.
    """
    from diffbuf_lib.data import build_demo

    print(build_demo(out_path, train=train, valid=valid, seed=seed, progress=True))


def data_build_command(
    speech_path: Path,
    noise_path: Path,
    out_path: Path,
    train: int = 6480,
    valid: int = 720,
    seconds: float = 1.0,
    sample_rate: int = 16000,
    snr: tuple[float, float] = (-30.0, 0.0),
    distance: tuple[float, float] = (5.0, 20.0),
    seed: int = 0,
    processes: int | None = None,
) -> None:
    """Make DN-LM from a LibriSpeech-shaped tree and a folder of drone noise.

    The same bytes for any number of processes; a stopped build goes on when started again.

    Args:
        speech_path: speech, .wav or .flac at any depth, a speaker a folder.
        noise_path: noise, .wav or .flac.
        out_path: folder to make.
        train: training clips.
        valid: validation clips.
        seconds: length of a clip.
        sample_rate: Hz; sources of another rate are resampled.
        snr: lowest and highest input SNR, dB.
        distance: nearest and farthest speaker, m.
        seed: of everything drawn.
        processes: how many work side by side; default: the cores of this machine.
    """
    from diffbuf_lib.data import build_dnlm

    print(
        build_dnlm(
            speech_path, noise_path, out_path, train=train, valid=valid, seconds=seconds,
            sample_rate=sample_rate, snr=snr, distance=distance, seed=seed, processes=processes,
            progress=True,
        )
    )  # fmt: skip


def data_download_command(
    name: Positional[str] = "librispeech",
    out_path: Path = Path("data/LibriSpeech"),
    subset: str = "train-clean-100",
) -> None:
    """Download a speech corpus; needs the internet.

    Args:
        name: librispeech.
        out_path: folder to make.
        subset: of LibriSpeech: dev-clean, test-clean, train-clean-100, train-clean-360, ...
    """
    from diffbuf_lib.data import download_librispeech

    if name != "librispeech":
        raise ConfigError(f"corpus {name!r} is unknown: librispeech is the only one")
    print(download_librispeech(out_path, subset))


_DATA_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": data_demo_command,
    "build": data_build_command,
    "download": data_download_command,
}


def _load_model(folder: Path, device: str) -> Any:
    import torch

    from diffbuf_lib.model import DiffusionBufferModel

    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {folder} holds no trained model: give a folder that training wrote, such as "
            "results/demo/model"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return DiffusionBufferModel.from_pretrained(folder).to(device).eval()


def _with_batch_size(cfg: Config, train_set: Any, device: str, resumed: Path | None) -> Config:
    """Return the config with the largest batch that fits; a resumed run keeps the one it has."""
    from diffbuf_lib.training.memory import find_batch_size

    if resumed is not None and (resumed / "config.yaml").is_file():
        size = load_config(resumed / "config.yaml").training.batch_size
        _say(f"batch_size {size}, which the resumed run began with")
    else:
        size = find_batch_size(cfg, train_set, device)
        _say(f"batch_size {size} fits (training.batch_size was {cfg.training.batch_size})")
    return cfg.override(f"training.batch_size={size}")


def _consult_doctor(
    cfg: Config, train_set: Any, valid_set: Any, device: str, results_path: Path
) -> None:
    """Print warnings and errors, a line each; stop on an error."""
    from diffbuf_lib.diagnostics.doctor import examine, has_error

    findings = examine(cfg, train_set, valid_set, device=device, results_path=results_path)
    for finding in findings:
        if finding.severity in ("error", "warning"):
            print(f"doctor: {finding.line()}", file=sys.stderr)
    if has_error(findings):
        print("doctor: not started; --skip_doctor starts all the same", file=sys.stderr)
        sys.exit(1)


def _scores(valid: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in valid.items() if not k.endswith("_clips"))


def _say(line: str) -> None:
    """Print a line above a progress bar."""
    from tqdm import tqdm

    tqdm.write(line)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: Any = None, line: str | None = None,
) -> None:  # fmt: skip
    print(f"warning: {message}", file=sys.stderr)
