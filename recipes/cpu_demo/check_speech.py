"""Score a sample of the utterances made by speech.py: a table by utterance, and means.

    python check_speech.py DIR [--number 30]

`pause` is the share of frames of 10 ms which are 40 dB below the loudest, `clip` the share of
samples at full scale, `letters` the letters of the text per second (which reveals words left out or
drawn out), and the last four are DNSMOS (signal, background, overall) and P.808, from 1 to 5.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
from speechmos import dnsmos

COLUMNS = ("seconds", "pause", "peak", "clip", "letters", "sig", "bak", "ovrl", "p808")


def score(path: Path, text: str) -> list[float]:
    """Return the figures of COLUMNS for one file at 16 kHz."""
    audio, rate = soundfile.read(path, dtype="float32")
    frames = audio[: len(audio) // 160 * 160].reshape(-1, 160)
    level = np.sqrt(np.mean(frames**2, axis=1))
    mos = dnsmos.run(audio, rate)
    seconds = len(audio) / rate
    return [
        seconds,
        float(np.mean(level < 0.01 * level.max())),
        float(np.abs(audio).max()),
        float(np.mean(np.abs(audio) > 0.999)),
        len(text) / seconds,
        *(float(mos[key]) for key in ("sig_mos", "bak_mos", "ovrl_mos", "p808_mos")),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Score a sample of the utterances.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=30)
    args = parser.parse_args()
    lines = (args.folder / "manifest.jsonl").read_text("utf-8").splitlines()
    step = max(1, len(lines) // args.number)
    table = []
    print(" ".join(f"{name:>7}" for name in COLUMNS))
    for line in lines[::step][: args.number]:
        entry = json.loads(line)
        table.append(score(args.folder / entry["file"], entry["text"]))
        row = " ".join(f"{value:7.2f}" for value in table[-1])
        print(row, entry["language"], entry["speed"], entry["mix"], entry["text"])
    for name in ("mean", "min", "max"):
        values = getattr(np, name)(table, axis=0)
        print(" ".join(f"{value:7.2f}" for value in values), name)


if __name__ == "__main__":
    main()
