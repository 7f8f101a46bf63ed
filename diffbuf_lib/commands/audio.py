"""`diffbuf enhance|stream|demo|demo-model`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from diffbuf_lib.commands.common import Overrides, say
from diffbuf_lib.config import load_config
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.pretrained import DEFAULT as DEFAULT_MODEL


def enhance_command(
    source: Positional[Path],
    output: Annotated[Path, arg(aliases=["-o"])],
    model: str = DEFAULT_MODEL,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Enhance a file, or every .wav and .flac below a folder, as a stream.

    Args:
        source: file or folder, of any sample rate and length.
        output: file or folder.
        model: folder of a trained model, such as results/demo/model, or a name such as
            diffbuf/cpu-demo.
        seed: of the diffusion noise.
        device: auto, cpu or cuda.
    """
    from diffbuf_lib.enhancement import enhance_path
    from diffbuf_lib.model import load_model

    for _, written in enhance_path(load_model(model, device), source, output, seed=seed):
        print(written)


def stream_command(
    source: Positional[Path] = Path("-"),
    output: Positional[Path] = Path("-"),
    *,
    model: str = DEFAULT_MODEL,
    realtime: bool = False,
    delay: int | None = None,
    threads: int | None = None,
    compiled: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    device: Literal["file", "mic"] = "file",
) -> None:
    """Enhance a stream hop by hop, and report on stderr whether this machine keeps up.

    A file, the microphone, or raw s16le mono PCM of the model's rate on stdin and stdout.

    Args:
        source: file of the model's sample rate; - for stdin.
        output: .wav or .flac file; - for stdout.
        model: folder of a trained model, or a name such as diffbuf/cpu-demo.
        realtime: feed a file at its own pace.
        delay: frames from a sample to its output, 1 to buffer_size, of a data-prediction model.
        threads: CPU threads of torch; default: its own choice.
        compiled: run one compiled graph of a block_causal model: a minute to start, then faster.
        precision: fp32, or bf16 for the network of a block_causal model.
        seed: of the diffusion noise.
        device: file (or pipe), or mic: from the microphone to the headphones until Ctrl-C.
    """
    import torch

    from diffbuf_lib.live_io import run_microphone, stream_path
    from diffbuf_lib.model import load_model
    from diffbuf_lib.streaming import OnlineEnhancer

    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads {threads}: give at least 1")
        torch.set_num_threads(threads)
    enhancer = OnlineEnhancer(
        load_model(model, "cpu"), seed=seed, delay=delay, compiled=compiled, precision=precision
    )
    if device == "mic":
        report = run_microphone(enhancer)
    else:
        report = stream_path(enhancer, source, output, realtime=realtime)
    print(report, file=sys.stderr)


def demo_command(
    config_path: Path = Path("configs/demo.yaml"),
    data_path: Path = Path("data/DN-LM-demo"),
    results_path: Path = Path("results/demo"),
    overrides: Overrides = (),
) -> None:
    """Build the demo set, train a little on it, enhance held-out clips, write a report.

    Args:
        config_path: what to train.
        data_path: where the demo set is, or will be made.
        results_path: where everything else goes.
        overrides: config keys.
    """
    from diffbuf_lib.demo import run_demo

    cfg = load_config(config_path, overrides)
    print(run_demo(cfg, data_path, results_path, say=say, progress=True))


def demo_model_command(
    config_path: Path = Path("configs/demo_model.yaml"),
    data_path: Path = Path("data/pretraining"),
    results_path: Path = Path("results/demo_model"),
    overrides: Overrides = (),
) -> None:
    """Make data from Debian's voices and train a model to ship on it: hours on a CPU.

    Args:
        config_path: what to train, in the second of two stages; the first has thrice its steps.
        data_path: where the data is, or will be made from Debian's packages.
        results_path: where everything else goes; an interrupted run goes on.
        overrides: config keys.
    """
    from diffbuf_lib.pretraining import run_pretraining

    cfg = load_config(config_path, overrides)
    print(run_pretraining(cfg, data_path, results_path, say=say, progress=True))
