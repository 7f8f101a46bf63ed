"""`diffbuf enhance|stream|evaluate|demo`."""

from __future__ import annotations

import csv
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from diffbuf_lib.commands.common import Overrides, say
from diffbuf_lib.config import load_config
from diffbuf_lib.errors import ConfigError


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
    print(run_demo(cfg, data_path, results_path, say=say, progress=True))


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
