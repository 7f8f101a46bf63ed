"""The data of a model to ship: Debian packages, recordings under free licences, synthesis.

    train/{speech,noise}/         for dataset_type 4, which draws all other noise (`endless`)
    valid/speech/                 other speakers, also under families of noise not in training
    test/sample_*/                DN-LM clips, another language and speaker, synthesised drones
    test_recordings/sample_*/     recordings of another kind, in nine languages

`SPEAKERS` lists the speakers of each part.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data.audio import list_audio, read_info, write_audio
from diffbuf_lib.data.build import (
    Sample,
    Split,
    claim,
    draw_samples,
    make_samples,
    run_parallel,
)
from diffbuf_lib.errors import DataError
from recipes.cpu_demo import recordings
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
# The English and the Spanish prompts have the same speaker, so they stay together.
SPEAKERS = {"train": ("en", "es", "fr"), "valid": ("ru",), "test": ("it",)}
TEST_DRONES_HZ = (220.0, 260.0)  # blade-passing frequencies
SNRS = (-10.0, -5.0, 0.0, 5.0)  # dB, taken in turn by test clips

_COUNT = 100  # clips of each test set
_SPLIT_NUMBERS = {"test": 2, "test_recordings": 3}  # keys of randomness
_CLIP_SECONDS = 4.0
_DISTANCE = (1.0, 4.0)  # m
_FILE_SECONDS = 10.0  # of a training speech file: prompts alone are too short to crop
_SENTENCES = 60  # that each synthetic voice reads
_PAUSE = 0.2  # s between prompts
_DRONES, _DRONE_SECONDS = 16, 20.0


def build_pretraining(
    out_dir: str | Path,
    *,
    seed: int = 0,
    processes: int = 2,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Path:
    """Make the data of a model to ship; existing files are kept.

    Takes a few minutes on two cores, and 0.3 GB. It needs Debian's archive (telephone prompts), the
    programs flite, festival and espeak-ng with the voices of `voices.VOICES`, and
    `pip install 'diffbuf[demo,pretraining]'`. Recordings that cannot be fetched are left out, and
    so is `out_dir/kokoro`, if `speech.py` has not written it.

    Args:
        out_dir: where to make it.
        seed: of all random draws.
        processes: worker processes.
        say: is called with what is left out.
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
    claim(out / "pretraining.json", {"version": 2, "seed": seed})
    work: list[_Job] = []
    for split, languages in SPEAKERS.items():
        for language in languages:
            folder = _speech_folder(out, split) / f"asterisk-{language}"
            work.append((_record, (language, folder, out / "packages")))
    for number, voice in enumerate(VOICES):
        work.append((_read, (number, out / "train" / "speech" / voice.name, seed)))
    drones = out / "sources" / "drones"
    work += [(_fly, (drones / f"drone-{n:03d}.wav", n, seed)) for n in range(_DRONES)]
    run_parallel(_run, work, processes, desc="sources", disable=not progress)
    join_recordings(_speech_folder(out, "test_recordings"))
    recordings.gather(out / "train", out / "clones", say=say)
    _link_kokoro(out, say)
    samples = [sample for name in _SPLIT_NUMBERS for sample in _clips(out, name, drones, seed)]
    make_samples(samples, processes=processes, progress=progress)
    return out


def _link_kokoro(out: Path, say: Callable[[str], None]) -> None:
    """Let training and validation find the speech that `speech.py` wrote."""
    if not (out / "kokoro" / "train").is_dir():
        say(f"left out: Kokoro's speech ({out / 'kokoro'}; see recipes/cpu_demo/README.md)")
        return
    for split, part in (("train", "train"), ("valid", "test")):
        link = out / split / "speech" / "kokoro"
        if not link.is_symlink() and (out / "kokoro" / part).is_dir():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path("..", "..", "kokoro", part))


def _run(job: _Job) -> None:
    function, arguments = job
    function(*arguments)


def _speech_folder(out: Path, split: str) -> Path:
    below = out / split if split in ("train", "valid") else out / "sources" / split
    return below / "speech"


def _clips(out: Path, name: str, noise_dir: Path, seed: int) -> Iterator[Sample]:
    """Draw the clips of a test set."""
    speech_dir = _speech_folder(out, name)
    speech = [path.relative_to(speech_dir).as_posix() for path in list_audio(speech_dir)]
    noise = [
        (path.relative_to(noise_dir).as_posix(), 0, read_info(path).frames)
        for path in list_audio(noise_dir)
    ]
    split = Split(
        name=name,
        number=_SPLIT_NUMBERS[name],
        count=_COUNT,
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


# The sources. Each function makes the missing files of one speaker or one drone.


def _record(language: str, folder: Path, packages: Path) -> None:
    """Join a speaker's prompts into files of about 10 s."""
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
    """Join waves [1, T] with short pauses into pieces of about 10 s, peak 0.9."""
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


def _fly(path: Path, number: int, seed: int) -> None:
    """Synthesise a drone whose blade-passing frequency is the test's."""
    if path.exists():
        return
    rng = np.random.default_rng([seed, 20, 2, number])
    low, high = TEST_DRONES_HZ
    drone = DroneParameters.draw(rng)
    while not low <= drone.blades * drone.rotor_speed <= high:
        drone = DroneParameters.draw(rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = round(_DRONE_SECONDS * SAMPLE_RATE)
    write_audio(path, 0.9 * synthesise(drone, frames, SAMPLE_RATE, rng), SAMPLE_RATE)
