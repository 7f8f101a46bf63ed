"""Speech for pretraining: recordings and synthetic voices that come in Debian packages.

Recordings are the telephone prompts of asterisk-core-sounds (16 kHz, ITU-T G.722); the others are
spoken by flite, festival and espeak-ng. Texts come from the Python documentation that every
interpreter includes (`pydoc_data`). No audio is kept in the repository.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data.audio import read_audio, resample
from diffbuf_lib.errors import DataError, MissingExtraError

SAMPLE_RATE = 16000  # Hz
_G722_BITS = 64000  # bits/s, at which the prompts are coded
_SKIPPED = {"silence"}  # prompts without speech


@dataclass(frozen=True)
class Voice:
    """A synthetic voice.

    Attributes:
        name: of the speaker's folder.
        program: flite, festival or espeak-ng.
        voice: as the program calls it.
        package: the Debian package that has it.
    """

    name: str
    program: str
    voice: str
    package: str


VOICES = (
    *(Voice(f"flite-{v}", "flite", v, "flite") for v in ("awb", "rms", "slt", "kal16")),
    *(
        Voice(f"festival-{name}", "festival", f"voice_{voice}", f"festvox-{package}")
        for name, voice, package in (
            ("dita", "czech_dita", "czech-dita"),
            ("krb", "czech_krb", "czech-krb"),
            ("machac", "czech_machac", "czech-machac"),
            ("ph", "czech_ph", "czech-ph"),
            ("lj", "suo_fi_lj_diphone", "suopuhe-lj"),
            ("mv", "hy_fi_mv_diphone", "suopuhe-mv"),
            ("ona", "upc_ca_ona_hts", "ca-ona-hts"),
            ("ked", "ked_diphone", "kdlpc16k"),
        )
    ),
    *(Voice(f"espeak-{v}", "espeak-ng", v, "espeak-ng") for v in ("en-us+m3", "en-gb+f2", "de+m5")),
)


def missing_programs(voices: Iterable[Voice] = VOICES) -> list[str]:
    """Return the Debian packages of programs that are not installed."""
    programs = {voice.program for voice in voices}  # each in a package of its own name
    return sorted(program for program in programs if shutil.which(program) is None)


def sentences() -> list[str]:
    """Return plain English sentences of 5 to 20 words from the interpreter's documentation."""
    from pydoc_data.topics import topics

    text = " ".join(re.sub(r"\s+", " ", topics[name]) for name in sorted(topics))
    found = re.findall(r"(?<=[.!?] )[A-Z][a-z]+(?:,? [a-z]+){4,19}\.", text)
    return list(dict.fromkeys(found))


def speak(voice: Voice, texts: Sequence[str], folder: Path) -> Tensor:
    """Let a synthetic voice read texts.

    Args:
        voice: which one.
        texts: sentences.
        folder: for the program's own file, which is removed again.

    Returns:
        [1, T] float32 at 16 kHz, peak 0.9.

    Raises:
        DataError: the program fails; the message quotes its output and names the package.
    """
    source, target = folder / f"{voice.name}.txt", folder / f"{voice.name}.wav"
    source.write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = {
        "flite": ["flite", "-voice", voice.voice, "-f", str(source), "-o", str(target)],
        "festival": ["text2wave", "-eval", f"({voice.voice})", str(source), "-o", str(target)],
        "espeak-ng": ["espeak-ng", "-v", voice.voice, "-f", str(source), "-w", str(target)],
    }[voice.program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not target.exists():
            raise DataError(
                f"{' '.join(command[:3])} failed ({done.stderr.strip()[-200:]}): install "
                f"{voice.package}"
            )
        wave, rate = read_audio(target)
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    wave = resample(wave.mean(0, keepdim=True), rate, SAMPLE_RATE)
    return wave * (0.9 / wave.abs().max())


def prompts(folder: Path) -> Iterator[Tensor]:
    """Decode the prompts of one speaker, in the order of their paths.

    Args:
        folder: such as `usr/share/asterisk/sounds/it_IT_m_Carlo`.

    Yields:
        [1, T] float32 at 16 kHz, full scale 1.

    Raises:
        MissingExtraError: the decoder is not installed.
    """
    try:
        from G722 import G722
    except ImportError as error:
        raise MissingExtraError(
            "the prompts need the package G722, which is not installed: "
            "pip install 'diffbuf[pretraining]'"
        ) from error
    for path in sorted(folder.rglob("*.g722")):
        if _SKIPPED.isdisjoint(path.relative_to(folder).parts):
            samples = np.asarray(G722(SAMPLE_RATE, _G722_BITS).decode(path.read_bytes()))
            yield torch.from_numpy(samples.astype(np.float32) / 32768)[None]


def unpack_prompts(language: str, folder: Path) -> Path:
    """Fetch and unpack the prompts of a language with Debian's own tools, without installing them.

    Args:
        language: en, es, fr, it or ru.
        folder: where to.

    Returns:
        The folder of the speaker.

    Raises:
        DataError: this is not Debian, or the package cannot be fetched.
    """
    package = f"asterisk-core-sounds-{language}-g722"
    root = folder / package
    if not root.exists():
        folder.mkdir(parents=True, exist_ok=True)
        commands = (["apt-get", "download", package], ["dpkg-deb", "-x", "{deb}", str(root.name)])
        for command in commands:
            debs = [str(path.name) for path in folder.glob(f"{package}_*.deb")]
            filled = [part.format(deb=debs[0] if debs else "") for part in command]
            try:
                subprocess.run(filled, cwd=folder, capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                why = getattr(error, "stderr", None) or str(error)
                raise DataError(
                    f"{package} is unavailable ({why.strip()[-200:]}): the recordings come from "
                    "Debian's archive, so run this on Debian or Ubuntu with a network"
                ) from error
    return next(path for path in sorted((root / "usr/share/asterisk/sounds").iterdir()))
