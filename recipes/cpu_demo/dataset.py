"""The data of a model to ship: made at build time from Debian packages and synthesis.

    train/{speech,noise,rooms}/   mixed while training (dataset_type 3)
    valid/sample_*/               DN-LM clips, another language, speaker and other drones
    test/sample_*/                the same again
    test_recordings/sample_*/     recordings of another kind, in nine languages

Who speaks and which drones fly is stated in `SPEAKERS` and `HELD_OUT_HZ`, and is disjoint between
training, validation and test.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data.audio import list_audio, read_audio, read_info, write_audio
from diffbuf_lib.data.build import (
    Sample,
    Split,
    draw_samples,
    make_samples,
    run_parallel,
)
from diffbuf_lib.errors import DataError
from recipes.cpu_demo.noises import KINDS
from recipes.cpu_demo.rooms import draw_response
from recipes.cpu_demo.voices import (
    SAMPLE_RATE,
    VOICES,
    missing_programs,
    prompts,
    sentences,
    speak,
    unpack_prompts,
)
from recipes.demo.demo_set import join_recordings
from recipes.demo.drone import DroneParameters, synthesise

_Job = tuple[Callable[..., None], tuple[object, ...]]  # a function and its arguments
# The English and the Spanish prompts are by one speaker, so they stay together.
SPEAKERS = {"train": ("en", "es", "fr"), "valid": ("ru",), "test": ("it",)}
# Blade-passing frequencies, Hz, of the drones of validation and test; training has none of them.
HELD_OUT_HZ = {"valid": (150.0, 175.0), "test": (220.0, 260.0)}
SNRS = (-10.0, -5.0, 0.0, 5.0)  # dB, taken in turn by validation and test clips

_COUNTS = {"valid": 48, "test": 100, "test_recordings": 100}
_SPLIT_NUMBERS = {"valid": 1, "test": 2, "test_recordings": 3}  # keys of randomness
_CLIP_SECONDS = 4.0
_DISTANCE = (1.0, 4.0)  # m
_FILE_SECONDS = 10.0  # of a training speech file: prompts alone are too short to crop
_SENTENCES = 60  # that each synthetic voice reads
_PAUSE = 0.2  # s between prompts
_NOISE_SECONDS = 20.0
_DRONES = {"train": 1000, "valid": 12, "test": 16}  # what they differ in cannot be learnt from few
_DRONE_SECONDS = {"train": 8.0, "valid": _NOISE_SECONDS, "test": _NOISE_SECONDS}
_OTHER_NOISES = 64
_BABBLES = 24
_ROOMS = 200


def build_pretraining(
    out_dir: str | Path, *, seed: int = 0, processes: int = 2, progress: bool = False
) -> Path:
    """Make the data of a model to ship; what is there already is kept.

    A few minutes on two cores and 0.9 GB. It needs Debian's archive (telephone prompts), the
    programs flite, festival and espeak-ng with the voices of `voices.VOICES`, and
    `pip install 'diffbuf[demo,pretraining]'`.

    Args:
        out_dir: where to make it.
        seed: of everything drawn.
        processes: worker processes.
        progress: show progress bars on stderr.

    Returns:
        `out_dir`.

    Raises:
        DataError, MissingExtraError: a package is missing; the message names it.
    """
    out = Path(out_dir)
    if missing := missing_programs():
        voices = sorted({voice.package for voice in VOICES} | set(missing))
        raise DataError(f"{', '.join(missing)} not installed: apt-get install {' '.join(voices)}")
    work: list[_Job] = []
    train = out / "train"
    for split, languages in SPEAKERS.items():
        for language in languages:
            folder = _speech_folder(out, split) / f"asterisk-{language}"
            work.append((_record, (language, folder, out / "packages")))
    for number, voice in enumerate(VOICES):
        work.append((_read, (number, train / "speech" / voice.name, seed)))
    for split, count in _DRONES.items():
        for number in range(count):
            path = _noise_folder(out, split) / f"drone-{number:03d}.wav"
            work.append((_fly, (path, split, number, seed)))
    for number in range(_OTHER_NOISES):
        work.append((_other, (train / "noise", number, seed)))
    run_parallel(_run, work, processes, desc="sources", disable=not progress)
    join_recordings(_speech_folder(out, "test_recordings"))
    work = [(_babble, (train, number, seed)) for number in range(_BABBLES)]
    work += [(_room, (train / "rooms", number, seed)) for number in range(_ROOMS)]
    run_parallel(_run, work, processes, desc="rooms", disable=not progress)
    samples = [sample for name in _COUNTS for sample in _clips(out, name, seed)]
    make_samples(samples, processes=processes, progress=progress)
    return out


def _run(job: _Job) -> None:
    function, arguments = job
    function(*arguments)


def _speech_folder(out: Path, split: str) -> Path:
    return out / "train" / "speech" if split == "train" else out / "sources" / split / "speech"


def _noise_folder(out: Path, split: str) -> Path:
    return out / "train" / "noise" if split == "train" else out / "sources" / split / "noise"


def _clips(out: Path, name: str, seed: int) -> Iterator[Sample]:
    """Draw the clips of validation or test."""
    speech_dir = _speech_folder(out, name)
    noise_dir = _noise_folder(out, "test" if name == "test_recordings" else name)
    speech = [path.relative_to(speech_dir).as_posix() for path in list_audio(speech_dir)]
    noise = [
        (path.relative_to(noise_dir).as_posix(), 0, read_info(path).frames)
        for path in list_audio(noise_dir)
    ]
    split = Split(
        name=name,
        number=_SPLIT_NUMBERS[name],
        count=_COUNTS[name],
        frames=round(_CLIP_SECONDS * SAMPLE_RATE),
        sample_rate=SAMPLE_RATE,
        snr=SNRS,
        distance=_DISTANCE,
        seed=seed,
        folder=out / name,
        speech_dir=speech_dir,
        noise_dir=noise_dir,
    )
    return draw_samples(split, speech, noise)


# The sources. Each function makes what is missing of one speaker, one noise or one room.


def _record(language: str, folder: Path, packages: Path) -> None:
    """Join a speaker's prompts to files of about 10 s."""
    if folder.exists():
        return
    speaker = unpack_prompts(language, packages)
    _write_joined(prompts(speaker), folder, language)


def _read(number: int, folder: Path, seed: int) -> None:
    """Let one synthetic voice read sentences drawn for it."""
    if folder.exists():
        return
    rng = np.random.default_rng([seed, 10, number])
    texts = list(rng.permutation(sentences())[:_SENTENCES])
    with tempfile.TemporaryDirectory() as work:
        waves = (
            speak(VOICES[number], texts[i : i + 2], Path(work)) for i in range(0, _SENTENCES, 2)
        )
        _write_joined(waves, folder, VOICES[number].name)


def _write_joined(waves: Iterable[Tensor], folder: Path, stem: str) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for index, wave in enumerate(_joined(waves)):
        write_audio(temporary / f"{stem}-{index:03d}.wav", wave, SAMPLE_RATE)
    temporary.rename(folder)


def _joined(waves: Iterable[Tensor]) -> Iterator[Tensor]:
    """Join waves [1, T] with short pauses to pieces of about 10 s, peak 0.9."""
    pause = torch.zeros(1, round(_PAUSE * SAMPLE_RATE))
    parts: list[Tensor] = []
    for wave in waves:
        parts += [wave, pause]
        if sum(part.shape[1] for part in parts) >= _FILE_SECONDS * SAMPLE_RATE:
            yield _loud(torch.cat(parts, dim=1))
            parts = []
    if parts:
        yield _loud(torch.cat(parts, dim=1))


def _loud(wave: Tensor) -> Tensor:
    return wave * (0.9 / wave.abs().max())


def _fly(path: Path, split: str, number: int, seed: int) -> None:
    """Synthesise a drone whose blade-passing frequency belongs to the split."""
    if path.exists():
        return
    rng = np.random.default_rng([seed, 20, list(_DRONES).index(split), number])
    drone = DroneParameters.draw(rng)
    while _owner(drone.blades * drone.rotor_speed) != split:
        drone = DroneParameters.draw(rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = round(_DRONE_SECONDS[split] * SAMPLE_RATE)
    write_audio(path, 0.9 * synthesise(drone, frames, SAMPLE_RATE, rng), SAMPLE_RATE)


def _owner(blade_passing: float) -> str:
    """Return the split that a blade-passing frequency, Hz, belongs to."""
    for split, (low, high) in HELD_OUT_HZ.items():
        if low <= blade_passing <= high:
            return split
    return "train"


def _other(folder: Path, number: int, seed: int) -> None:
    """Synthesise noise that is no drone."""
    kind = list(KINDS)[number % len(KINDS)]
    path = folder / f"{kind}-{number:03d}.wav"
    if path.exists():
        return
    rng = np.random.default_rng([seed, 30, number])
    folder.mkdir(parents=True, exist_ok=True)
    wave = KINDS[kind](rng, round(_NOISE_SECONDS * SAMPLE_RATE), SAMPLE_RATE)
    write_audio(path, 0.9 * wave, SAMPLE_RATE)


def _babble(train: Path, number: int, seed: int) -> None:
    """Let 4 to 10 of the training speakers talk at once."""
    path = train / "noise" / f"babble-{number:03d}.wav"
    if path.exists():
        return
    rng = np.random.default_rng([seed, 40, number])
    files = list_audio(train / "speech")
    frames = round(_NOISE_SECONDS * SAMPLE_RATE)
    total = torch.zeros(1, frames)
    for _ in range(int(rng.integers(4, 11))):
        wave = torch.cat([read_audio(files[i])[0] for i in rng.integers(len(files), size=4)], dim=1)
        wave = wave.repeat(1, -(-frames // wave.shape[1]))[:, :frames]
        total += rng.uniform(0.3, 1) * wave.roll(int(rng.integers(frames)), dims=1)
    write_audio(path, _loud(total), SAMPLE_RATE)


def _room(folder: Path, number: int, seed: int) -> None:
    """Synthesise one room's impulse response."""
    path = folder / f"room-{number:03d}.wav"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    response = draw_response(np.random.default_rng([seed, 50, number]), SAMPLE_RATE)
    write_audio(path, response[None] / response.abs().max(), SAMPLE_RATE, subtype="FLOAT")
