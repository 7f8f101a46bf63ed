"""`diffbuf data ...` and `diffbuf config`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tyro.conf import Positional

from diffbuf_lib.commands.common import Overrides
from diffbuf_lib.config import describe_keys, load_config
from diffbuf_lib.errors import ConfigError


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


DATA_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": data_demo_command,
    "build": data_build_command,
    "download": data_download_command,
}
