"""Score a model and its rivals on recordings that neither was made with.

    python -m benchmarks.real_world --speech FOLDER --noise FOLDER --out results/real_world
    python -m benchmarks.real_world --clips FOLDER --pairs FOLDER --outputs theirs=FOLDER ...
    python -m benchmarks.real_world --clips FOLDER --also smaller=results/small/model

With the same recordings you get the same clips: all random draws depend only on the seed and the
sorted file names. The card's numbers are from these public recordings, none of which states a
licence that would let us redistribute them:

- speech: clean files of EARS speakers in github sp-uhh/streamfm_examples;
- drones: the Bebop recordings of github saraalemadi/DroneAudioDataset;
- pairs: EARS speech under WHAM noise, clean and noisy, in sp-uhh/streamfm_examples, with
  the outputs of several systems, for --outputs.

Prints three tables: by input SNR, by level, and for the pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data.audio import list_audio, read_audio, read_info, resample, write_audio
from diffbuf_lib.data.mixing import is_silent, mix_pair
from diffbuf_lib.errors import DataError, MissingExtraError
from diffbuf_lib.evaluation.baselines import NOISY, OURS, make_baselines
from diffbuf_lib.evaluation.bootstrap import summarise
from diffbuf_lib.evaluation.evaluate import Job, evaluate_folder
from diffbuf_lib.evaluation.scores import read_scores, score
from diffbuf_lib.registry import BASELINES
from diffbuf_lib.trace import format_table

RATE = 16000  # Hz
SNRS = (-30, -20, -15, -10, -5, 0, 5)  # dB
GAINS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
METRICS = ("si_sdr", "pesq", "estoi")


def main() -> None:
    """Make the clips, score them, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_world", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="diffbuf/cpu-demo")
    parser.add_argument("--delay", type=int, help="frames; default: the model's buffer")
    parser.add_argument("--speech", type=Path, help="clean recordings")
    parser.add_argument("--noise", type=Path, help="recorded noise, mixed with the speech")
    parser.add_argument("--clips", type=Path, help="clips as this made them, or in DN-LM's layout")
    parser.add_argument("--pairs", type=Path, help="a folder with clean/ and noisy/")
    theirs = "what other systems made of noisy/, files of the same names"
    parser.add_argument("--outputs", nargs="*", default=[], metavar="NAME=FOLDER", help=theirs)
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="NAME=MODEL", help="further models"
    )
    parser.add_argument("--clips-per-snr", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--baselines", nargs="*", default=available())
    parser.add_argument("--out", type=Path, default=Path("results/real_world"))
    given = parser.parse_args()
    clips = given.clips
    if given.speech and given.noise:
        clips = given.out / "clips"
        make_clips(given.speech, given.noise, clips, given.clips_per_snr, given.seconds, given.seed)
    if clips is None and given.pairs is None:
        parser.error("give --speech and --noise, --clips, or --pairs")

    also = {name: model for name, _, model in (item.partition("=") for item in given.also)}
    if not all(also.values()) or {OURS, NOISY, *BASELINES}.intersection(also):
        parser.error("--also takes NAME=MODEL, with a name that no row has yet")

    def run(
        folder: Path, layout: int, name: str, baselines: Sequence[str], model: str = given.model
    ) -> Path:
        job = Job(
            model=model, data_path=str(folder), dataset_type=layout, metrics=METRICS,
            baselines=tuple(baselines), delay=given.delay,
        )  # fmt: skip
        evaluate_folder(job, given.out / name, progress=True)
        return Path(given.out / name)

    def beside(folder: Path, layout: int, name: str) -> dict[str, Any]:
        found = run(folder, layout, name, given.baselines)
        others = {n: run(folder, layout, f"also/{n}/{name}", [NOISY], m) for n, m in also.items()}
        return joined(found, others)

    if clips is not None:
        print(by_snr(beside(clips, 1, "by_snr")))
        for gain in GAINS:
            folder = given.out / "levels" / f"{gain:g}"
            scale_clips(clips, folder, gain)
            run(folder, 1, f"by_level/{gain:g}", [NOISY])
        print(by_level(given.out))
    if given.pairs is not None:
        found = beside(given.pairs, 2, "pairs")
        outputs = dict(item.split("=", 1) for item in given.outputs)
        theirs_scored = {
            name: score_outputs(given.pairs / "clean", Path(folder))
            for name, folder in outputs.items()
        }
        print(of_pairs(found, theirs_scored))


def available() -> list[str]:
    """Return the baselines whose packages are installed."""
    found = []
    for name in map(str, BASELINES):
        try:
            make_baselines([name])
        except MissingExtraError:
            continue
        found.append(name)
    return found


def make_clips(
    speech: Path, noise: Path, out: Path, per_snr: int, seconds: float, seed: int
) -> None:
    """Write DN-LM's layout, one folder per clip, `sample_SNR_NUMBER`; existing ones are kept.

    Raises:
        DataError: a folder without audio, or files too short or too silent.
    """
    speech_files, noise_files = _found(speech), _found(noise)
    for snr in SNRS:
        for number in range(per_snr):
            folder = out / f"sample_{snr:+03d}_{number}"
            if (folder / "vocals.wav").exists():
                continue
            rng = np.random.default_rng([seed, snr + 100, number])
            clean, noisy = (excerpt(files, seconds, rng) for files in (speech_files, noise_files))
            mixture = mix_pair(clean, noisy, float(snr), speech_distance=1.0)
            folder.mkdir(parents=True, exist_ok=True)
            for name, wave in (("mixture", mixture.mix), ("vocals", mixture.target)):
                write_audio(folder / f"{name}.wav", wave, RATE, "FLOAT")


def excerpt(files: Sequence[Path], seconds: float, rng: np.random.Generator) -> Tensor:
    """Draw an excerpt that is not silent, mono at RATE: [1, T]."""
    for _ in range(50):
        info = read_info(files[int(rng.integers(len(files)))])
        length = round(seconds * info.sample_rate)
        if info.frames < length:
            continue
        start = int(rng.integers(info.frames - length + 1))
        wave = resample(read_audio(info.path, start, length)[0], info.sample_rate, RATE)
        wave = wave.mean(0, keepdim=True)[:, : round(seconds * RATE)]
        if not is_silent(wave):
            return wave
    raise DataError(
        f"{files[0].parent} gave no excerpt of {seconds} s that is not silent: lower --seconds"
    )


def scale_clips(clips: Path, out: Path, gain: float) -> None:
    """Write the same clips at another level, in floating point."""
    for path in list_audio(clips):
        if path.stem in ("mixture", "vocals"):
            target = out / path.relative_to(clips).with_suffix(".wav")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_audio(target, gain * read_audio(path)[0], RATE, "FLOAT")


def score_outputs(clean: Path, outputs: Path) -> dict[str, float]:
    """Return the mean scores of another system's outputs, beside the clean files."""
    found = []
    for path in list_audio(clean):
        (target, rate), (estimate, _) = read_audio(path), read_audio(outputs / path.name)
        length = min(target.shape[1], estimate.shape[1])
        found.append(score(estimate[:, :length].mean(0), target[:, :length].mean(0), rate, METRICS))
    return {metric: fmean(one.values[metric] for one in found) for metric in METRICS}


def joined(folder: Path, others: Mapping[str, Path]) -> dict[str, Any]:
    """Return an evaluation's summary with our models of other evaluations added, clip by clip."""
    _, rows = read_scores(folder)
    for name, other in others.items():
        theirs = (row for row in read_scores(other)[1] if row.method == OURS)
        rows += [row._replace(method=name) for row in theirs]
    return summarise(rows, METRICS)


def by_snr(summary: dict[str, Any]) -> str:
    """SI-SDR gain over the input in every band, then the other scores over all clips."""
    methods = summary["methods"]
    bands = [name for name in summary["bands"] if name != "all"]
    table = [["gain in SI-SDR (dB) at an input SNR of", *bands, "ESTOI, all", "PESQ, all"]]
    for method in methods:
        gains = [
            mean_of(summary, band, "si_sdr", method) - mean_of(summary, band, "si_sdr", NOISY)
            for band in bands
        ]
        rest = [mean_of(summary, "all", metric, method) for metric in ("estoi", "pesq")]
        table.append([method, *(f"{gain:.1f}" for gain in gains), *(f"{x:.2f}" for x in rest)])
    return format_table(table) + "\n"


def by_level(out: Path) -> str:
    """Scores of the model's output for every gain, over the clips that have a score at each gain.

    At the lowest gains the speech of the noisiest clips counts as silence, which has no score.
    """
    scores = []
    for gain in GAINS:
        _, rows = read_scores(out / "by_level" / f"{gain:g}")
        scores.append({row.clip: row.values for row in rows if row.method == OURS})
    table = [["clips times", *(f"{gain:g}" for gain in GAINS), "clips"]]
    for metric in METRICS:
        common = set.intersection(*({c for c in one if metric in one[c]} for one in scores))
        means = [fmean(one[clip][metric] for clip in common) for one in scores]
        table.append([metric, *(f"{mean:.2f}" for mean in means), str(len(common))])
    return format_table(table) + "\n"


def of_pairs(summary: dict[str, Any], others: dict[str, dict[str, float]]) -> str:
    """Mean scores of every method, and of other systems' outputs."""
    rows = {m: {x: mean_of(summary, "all", x, m) for x in METRICS} for m in summary["methods"]}
    table = [["pairs", *METRICS]]
    for name, means in {**rows, **others}.items():
        table.append([name, *(f"{means[metric]:.3f}" for metric in METRICS)])
    return format_table(table) + "\n"


def mean_of(summary: dict[str, Any], band: str, metric: str, method: str) -> float:
    """Return a mean from summary.json; NaN if no clip has the score."""
    found = summary["bands"][band]["columns"][metric]["methods"][method]["mean"]
    return float(found["mean"]) if found else float("nan")


def _found(folder: Path) -> list[Path]:
    files = list_audio(folder)
    if not files:
        raise DataError(f"{folder} holds no .wav or .flac file: check the path")
    return files


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
