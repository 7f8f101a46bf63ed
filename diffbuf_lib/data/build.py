"""Make a DN-LM dataset from a speech folder and a noise folder."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffbuf_lib.data.files import list_audio, write_bytes
from diffbuf_lib.data.holdout import split_noise, split_speech
from diffbuf_lib.data.recipe import Split, is_complete, make_sample, write_metadata
from diffbuf_lib.errors import DataError

# Below so many samples a process is not worth its start (torch's import takes seconds).
_SAMPLES_WORTH_A_PROCESS = 200
_SPLIT_NUMBERS = {"train": 0, "valid": 1, "test": 2}  # keys of randomness: never renumber


def build_dnlm(
    speech_dir: str | Path,
    noise_dir: str | Path,
    out_dir: str | Path,
    *,
    train: int = 6480,
    valid: int = 720,
    seconds: float = 1.0,
    sample_rate: int = 16000,
    snr: tuple[float, float] = (-30.0, 0.0),
    distance: tuple[float, float] = (5.0, 20.0),
    seed: int = 0,
    test: int = 0,
    test_seconds: float = 6.0,
    valid_speakers: Collection[str] | None = None,
    processes: int | None = None,
    progress: bool = False,
) -> Path:
    """Make `{train,valid,test}/sample_00000/{mixture,vocals,noise}.wav` and `metadata.json`.

    Each sample depends on (seed, split, index) only: any number of processes writes the same bytes.
    An interrupted build goes on where it stopped when called again with the same arguments.

    Speech of train and valid is disjoint: by speaker, which is the first folder level below
    `speech_dir` at which there are two folders (that of LibriSpeech), or by file where there are
    fewer than two speakers. Noise is disjoint by file, or by time if there is only one file. The
    test split shares speakers and noise with valid, never with train. Every speech file is used
    once before any is used twice. Files of several channels are averaged to one, and files of
    another rate are resampled.

    Args:
        speech_dir: .wav or .flac files at any depth, such as `LibriSpeech/train-clean-100`.
        noise_dir: .wav or .flac files at any depth.
        out_dir: where to make the dataset; not inside the other two.
        train: number of training samples.
        valid: number of validation samples.
        seconds: length of their clips, s. Shorter speech is padded with zeros.
        sample_rate: Hz, of the files that are written.
        snr: lowest and highest input SNR, dB.
        distance: nearest and farthest talker, m.
        seed: of everything that is drawn.
        test: number of test samples.
        test_seconds: length of the test clips, s.
        valid_speakers: names of the speakers (or files) of valid and test; None draws them.
        processes: worker processes; None takes one a core, or none if there is little to do. With
            more than one, a script must call this below `if __name__ == "__main__":`.
        progress: show a progress bar on stderr.

    Returns:
        `out_dir`.

    Raises:
        DataError: an argument out of its limits; too few files to split; a source file that cannot
            be used; a disk that is full; or an `out_dir` that was built with other arguments. The
            message names the value and the fix.
    """
    speech_dir, noise_dir, out_dir = Path(speech_dir), Path(noise_dir), Path(out_dir)
    parameters: dict[str, Any] = {
        "train": train,
        "valid": valid,
        "seconds": seconds,
        "sample_rate": sample_rate,
        "snr": list(snr),
        "distance": list(distance),
        "seed": seed,
        "test": test,
        "test_seconds": test_seconds,
        "valid_speakers": None if valid_speakers is None else sorted(valid_speakers),
    }
    _check(parameters, processes)
    _check_folders(speech_dir, noise_dir, out_dir)
    splits = _plan(speech_dir, noise_dir, out_dir, parameters, valid_speakers)
    parameters["sources"] = _fingerprint(speech_dir, noise_dir)
    _claim(out_dir, parameters)
    todo = [
        (split.name, index)
        for split in splits
        for index in range(split.count)
        if not is_complete(split, index)
    ]
    done = _make(splits, todo, processes)
    total = sum(split.count for split in splits)
    for _ in tqdm(
        done, desc=out_dir.name, total=total, initial=total - len(todo), disable=not progress
    ):
        pass
    for split in splits:  # last: a metadata.json means that its split is whole
        write_metadata(split)
    return out_dir


def _check(parameters: dict[str, Any], processes: int | None) -> None:
    """Refuse arguments out of their limits."""
    for name, least in (("train", 1), ("valid", 0), ("test", 0), ("seed", 0)):
        if parameters[name] < least:
            raise DataError(f"{name} {parameters[name]} is below {least}: raise --{name}")
    if parameters["sample_rate"] < 1000:
        raise DataError(f"sample_rate {parameters['sample_rate']} Hz is below 1000: raise it")
    for name in ("seconds", "test_seconds"):
        if not 0.01 <= parameters[name] <= 3600:
            raise DataError(f"{name} {parameters[name]} is not in 0.01..3600 s: change --{name}")
    for name, low, high in (("snr", -100, 100), ("distance", 0.01, 10000)):
        smallest, largest = parameters[name]
        if not low <= smallest <= largest <= high:
            raise DataError(
                f"{name} ({smallest}, {largest}) is not a range (low, high) within {low}..{high}: "
                f"change --{name}"
            )
    if processes is not None and processes < 1:
        raise DataError(f"processes {processes} is below 1: raise --processes")


def _check_folders(speech_dir: Path, noise_dir: Path, out_dir: Path) -> None:
    """Refuse folders inside each other: noise would count as speech, results as sources."""
    named = {"speech_dir": speech_dir, "noise_dir": noise_dir, "out_dir": out_dir}
    real = {name: path.resolve() for name, path in named.items()}
    for inner, outer in (
        ("out_dir", "speech_dir"),
        ("out_dir", "noise_dir"),
        ("noise_dir", "speech_dir"),
        ("speech_dir", "noise_dir"),
    ):
        if real[inner].is_relative_to(real[outer]):
            raise DataError(
                f"{inner} {named[inner]} lies inside {outer} {named[outer]}: use separate folders"
            )


def _plan(
    speech_dir: Path,
    noise_dir: Path,
    out_dir: Path,
    parameters: dict[str, Any],
    valid_speakers: Collection[str] | None,
) -> list[Split]:
    """Decide which sources each split draws from."""
    counts = {name: parameters[name] for name in _SPLIT_NUMBERS}
    held_out = counts["valid"] + counts["test"]
    fraction = held_out / (counts["train"] + held_out)
    rate, seed = parameters["sample_rate"], parameters["seed"]
    frames = {name: round(parameters["seconds"] * rate) for name in counts}
    frames["test"] = round(parameters["test_seconds"] * rate)
    longest_held_out = max(
        frames[name] for name in ("valid", "test") if counts[name] or held_out == 0
    )
    speech = split_speech(speech_dir, fraction, seed, valid_speakers)
    noise = split_noise(noise_dir, fraction, seed, rate, frames["train"], longest_held_out)
    return [
        Split(
            name=name,
            number=number,
            count=counts[name],
            frames=frames[name],
            sample_rate=rate,
            snr=tuple(parameters["snr"]),
            distance=tuple(parameters["distance"]),
            seed=seed,
            folder=out_dir / name,
            speech_dir=speech_dir,
            noise_dir=noise_dir,
            speech=speech[min(number, 1)],
            noise=noise[min(number, 1)],
        )
        for name, number in _SPLIT_NUMBERS.items()
        if counts[name]
    ]


def _fingerprint(speech_dir: Path, noise_dir: Path) -> str:
    """Return a hash of the names and sizes of all source files, wherever the folders lie."""
    digest = hashlib.sha256()
    for folder in (speech_dir, noise_dir):
        for path in list_audio(folder):
            entry = f"{path.relative_to(folder).as_posix()}\t{path.stat().st_size}\n"
            digest.update(entry.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _claim(out_dir: Path, parameters: dict[str, Any]) -> None:
    """Save the parameters in a new folder; in an old one, refuse if they are others."""
    saved = out_dir / "build.json"
    fix = "choose another out_dir, or delete this one"
    if saved.exists():
        try:
            before = json.loads(saved.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise DataError(f"{saved} cannot be read: {fix}") from None
        now = json.loads(json.dumps(parameters))
        changed = [key for key in now if before.get(key) != now[key]]
        if "sources" in changed and len(changed) == 1:
            raise DataError(f"{out_dir} was built from other speech or noise files: {fix}")
        if changed:
            key = changed[0]
            raise DataError(
                f"{out_dir} was built with {key} {before.get(key)}, not {now[key]}: {fix}"
            )
    elif any((out_dir / name).exists() for name in _SPLIT_NUMBERS):
        raise DataError(f"{out_dir} holds a dataset without build.json, made elsewhere: {fix}")
    try:
        for name in _SPLIT_NUMBERS:
            if parameters[name]:
                (out_dir / name).mkdir(parents=True, exist_ok=True)
                for leftover in (out_dir / name).glob(".sample_*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{out_dir} cannot be written ({error.strerror}): {fix}") from error
    if not saved.exists():
        write_bytes(saved, (json.dumps(parameters, indent=1) + "\n").encode())


def _make(
    splits: Sequence[Split], todo: Sequence[tuple[str, int]], processes: int | None
) -> Iterator[None]:
    """Make the samples that are not there yet; yield once for each."""
    if processes is None:
        processes = min(_cores(), len(todo) // _SAMPLES_WORTH_A_PROCESS)
    by_name = {split.name: split for split in splits}
    if min(processes, len(todo)) <= 1:
        for name, index in todo:
            make_sample(by_name[name], index)
            yield
        return
    pool = ProcessPoolExecutor(
        min(processes, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),  # a fork would copy torch's locked threads
        initializer=_start_worker,
        initargs=(by_name,),
    )
    try:
        for future in as_completed([pool.submit(_work, *task) for task in todo]):
            future.result()
            yield
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended early (out of memory, or a script without "
            '`if __name__ == "__main__":`): run again with processes=1; finished samples are kept'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_splits: dict[str, Split] = {}  # set once in each worker, so that tasks are two small values


def _start_worker(splits: dict[str, Split]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    _worker_splits.update(splits)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the parent is gone: a killed parent cannot tell its workers to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(name: str, index: int) -> None:
    make_sample(_worker_splits[name], index)


def _cores() -> int:
    """Return the cores that this process may use, where the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
