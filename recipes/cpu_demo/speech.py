"""Unlimited training speech: our own sentences, spoken offline by Kokoro's voices and mixtures.

    python speech.py --out DIR --hours 12             # may be killed and restarted
    python speech.py --out DIR --hours 12 --part 0/2  # one of two processes
    python check_speech.py DIR                        # DNSMOS and other figures of a sample

Writes `DIR/{train,test}/SPEAKER/NUMBER.flac` (16 kHz, mono, 16 bits) and one line per utterance
into `DIR/manifest.jsonl`. Sentence, speaker, mixture, speed and level of utterance i depend on
(seed, i) only. Its samples are not reproducible bit by bit: Kokoro's excitation has fresh noise.
"""

import argparse
import functools
import json
import os
import random
import re
import signal
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from kokoro_model import ESPEAK, RATE, Kokoro

GRAMMAR = Path(__file__).resolve().parent / "grammar"
OUT_RATE = 16000  # Hz
# Never in training, nor in its mixtures. None has a namesake in another language ("alpha", "alex",
# "dora", "santa"), which may well be the same speaker.
TEST_VOICES: tuple[str, ...] = ("af_kore", "af_nova", "am_eric", "am_puck")
TEST_VOICES += ("bf_emma", "bm_fable", "hm_psi", "im_nicola")
TEST_SHARE = 0.05
MIXTURES = 1000  # mixed speakers, each of whom says several sentences
PLAIN_SHARE = 0.2  # utterances of the training part by a voice as it is
LANGUAGES = {"a": 0.6, "b": 0.18, "e": 0.06, "f": 0.04, "h": 0.04, "i": 0.04, "p": 0.04}
LETTERS_A_SECOND = dict.fromkeys(ESPEAK, 15.0) | {"h": 12.0}


class Utterance(NamedTuple):
    """What utterance i is, before it is spoken."""

    split: str
    speaker: str
    mix: dict[str, float]
    language: str
    text: str
    speed: float
    peak: float

    def path(self, i: int) -> Path:
        """Return its file, relative to the output folder."""
        return Path(self.split) / self.speaker / f"{i:06d}.flac"


@functools.cache
def grammar(language: str) -> dict[str, list[str]]:
    """Read the rules of a language: {name: alternatives}."""
    name = {"a": "en", "b": "en"}.get(language, ESPEAK[language][:2])
    rules: dict[str, list[str]] = {}
    for line in (GRAMMAR / f"{name}.txt").read_text("utf-8").splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            alternatives = rules.setdefault(match[1], [])
        elif line and not line.startswith("#"):
            alternatives += [item.strip() for item in line.split("|")]
    return rules


def pick(rng: random.Random, items: list[str]) -> str:
    """Choose one, using only `random()`, which is the same in every version of Python."""
    return items[int(rng.random() * len(items))]


def sentence(rng: random.Random, language: str, split: str) -> str:
    """Expand the grammar until the sentence belongs to the split; a tenth are for test."""
    rules = grammar(language)

    def expand(match: re.Match[str]) -> str:
        if bounds := re.fullmatch(r"(\d+)-(\d+)", match[1]):
            return str(int(bounds[1]) + int(rng.random() * (int(bounds[2]) - int(bounds[1]) + 1)))
        return pick(rng, rules[match[1]])

    while True:
        text = pick(rng, rules["start"])
        while "{" in text:
            text = re.sub(r"\{([\w-]+)\}", expand, text)
        if language in "ab":
            text = re.sub(r"\b([Aa]) (?=[aeio]|un|um)", r"\1n ", text)
            text = re.sub(r"(sh|ch|x|ss)s\b", r"\1es", text)
        text = re.sub(r" +(?=[,.])", "", text)
        # Spanish sentences may begin with a sign, so capitalise the first letter, not character
        text = re.sub(r"^\W*\w", lambda match: match[0].upper(), text)
        if (zlib.crc32(text.encode()) % 10 == 0) == (split == "test"):
            return text


def mixture(seed: int, number: int, voices: list[str]) -> tuple[str, dict[str, float]]:
    """Return the language and the weights of a mixed speaker.

    The first of two or three voices speaks the language and has at least half of the weight, which
    keeps the words correct. The others may be any.
    """
    rng = random.Random(f"speaker {seed} {number}")
    language = rng.choices(list(LANGUAGES), list(LANGUAGES.values()))[0]
    native = [name for name in voices if name[0] == language]
    names = [pick(rng, native)]
    for _ in range(1 + int(rng.random() * 2)):
        pool = native if rng.random() < 0.5 else voices
        names.append(pick(rng, [name for name in pool if name not in names] or voices))
    first = 0.5 + 0.3 * rng.random()
    rest = [0.2 + rng.random() for _ in names[1:]]
    weights = [first] + [(1 - first) * w / sum(rest) for w in rest]
    mix: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        mix[name] = round(mix.get(name, 0) + weight, 4)
    return language, mix


def utterance(seed: int, i: int, voices: list[str]) -> Utterance:
    """Draw utterance i. It is a function of the arguments only."""
    rng = random.Random(f"utterance {seed} {i}")
    split = "test" if rng.random() < TEST_SHARE else "train"
    train = [name for name in voices if name not in TEST_VOICES]
    if split == "test":
        speaker = pick(rng, list(TEST_VOICES))
        language, mix = speaker[0], {speaker: 1.0}
    elif rng.random() < PLAIN_SHARE:
        speaker = pick(rng, [name for name in train if name[0] in ESPEAK])
        language, mix = speaker[0], {speaker: 1.0}
    else:
        number = int(rng.random() * MIXTURES)
        speaker = f"mix{number:04d}"
        language, mix = mixture(seed, number, train)
    speed = round(0.8 + 0.45 * rng.random(), 3)
    letters = LETTERS_A_SECOND[language] * speed
    seconds = 2.2 + 5.3 * rng.random()
    text = "x" * 1000
    while len(text) > 8 * letters:
        text = sentence(rng, language, split)
        while len(text) < 0.7 * seconds * letters:
            text += " " + sentence(rng, language, split)
    return Utterance(split, speaker, mix, language, text, speed, 0.5 + 0.4 * rng.random())


def trim(audio: np.ndarray) -> np.ndarray:
    """Trim [samples] at 16 kHz to the speech plus 0.1 s, with 10 ms of fade at both ends."""
    hop = OUT_RATE // 100
    frames = audio[: len(audio) // hop * hop].reshape(-1, hop)
    level = np.sqrt(np.mean(frames**2, axis=1))
    loud = np.flatnonzero(level > 0.01 * level.max())
    audio = audio[max(0, loud[0] - 10) * hop : (loud[-1] + 11) * hop].copy()
    ramp = np.linspace(0, 1, hop, dtype=np.float32)
    audio[:hop] *= ramp
    audio[-hop:] *= ramp[::-1]
    return audio


def write(path: Path, audio: np.ndarray) -> None:
    """Write FLAC under a temporary name first, so that an existing file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    soundfile.write(temporary, audio, OUT_RATE, "PCM_16", format="FLAC")
    temporary.rename(path)


def make(out: Path, i: int, plan: Utterance, model: Kokoro) -> float:
    """Speak utterance i into its file, unless it is there, and return its seconds."""
    path = out / plan.path(i)
    if path.exists():
        return soundfile.info(path).duration
    audio = model.speak(model.phonemes(plan.text, plan.language), plan.mix, plan.speed)
    audio = trim(soxr.resample(audio, RATE, OUT_RATE).astype(np.float32))
    seconds = len(audio) / OUT_RATE
    if not np.isfinite(audio).all() or not 1 <= seconds <= 12:
        print(f"{i}: left out, {seconds:.2f} s: {plan.text}", flush=True)
        return 0.0
    write(path, audio * (plan.peak / np.abs(audio).max()))
    return seconds


def run(args: argparse.Namespace) -> None:
    """Speak this part's utterances until its hours are reached or SIGTERM or SIGINT arrives."""
    part, parts = map(int, args.part.split("/"))
    args.out.mkdir(parents=True, exist_ok=True)
    model = Kokoro(args.cache or args.out.parent)
    voices = sorted(model.voices)
    manifest = args.out / "manifest.jsonl"
    lines = manifest.read_text("utf-8").splitlines() if manifest.exists() else []
    listed = {json.loads(line)["file"] for line in lines}
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.append(number))
    total = fresh = 0.0  # seconds of speech, in total and by this process
    start, i = time.monotonic(), part
    with manifest.open("ab", buffering=0) as file:
        while total < args.hours * 3600 / parts and not stop and i < (args.limit or 1 << 30):
            plan = utterance(args.seed, i, voices)
            name = plan.path(i).as_posix()
            known = (args.out / name).exists()
            seconds = make(args.out, i, plan, model)
            if seconds and name not in listed:
                # one unbuffered append a line: lines of several processes do not mix
                entry = {"file": name, "seconds": round(seconds, 3)} | plan._asdict()
                file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            total += seconds
            fresh += 0.0 if known else seconds
            i += parts
            if (i - part) // parts % 50 == 0:
                took = time.monotonic() - start
                print(f"{i} {total / 3600:.2f} h, {fresh / took:.2f} s a second", flush=True)
    print(f"end at {i}: {total / 3600:.2f} h, signals {stop}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Speak sentences for training by Kokoro.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the products")
    parser.add_argument("--hours", type=float, default=12.0, help="of speech, of all parts")
    parser.add_argument("--part", default="0/1", help="a/b: every b-th utterance from a on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=0, help="stop before this utterance")
    parser.add_argument("--cache", type=Path, help="of model and voices; default: beside --out")
    run(parser.parse_args())
