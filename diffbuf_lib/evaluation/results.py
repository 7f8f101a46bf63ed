"""The results folder of an evaluation, and how it survives being stopped.

    RESULTS/
      arguments.json   what was asked for; a rerun with other arguments is refused
      journal.jsonl    a line a batch of clips, appended whole: what a rerun need not do again
      scores.csv       a row a clip and method; an undefined score is empty, its reason last
      summary.json     means, intervals, gains and leads, over all clips and by SNR band; clips
                       that have no score, with the reason
      timing.json      real-time factors, latencies, and where the time went
      report.html      all of it, with players and spectrograms of the best, median, worst clip

scores.csv and summary.json are equal to the byte however often the evaluation was stopped; the
journal and timing.json hold times, which never repeat.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.errors import CheckpointError, DataError
from diffbuf_lib.evaluation.scoring import columns_of

_FIXED = ("clip", "method", "snr_db", "seconds", "checksum")


@dataclass(frozen=True)
class Row:
    """One clip as one method left it.

    Attributes:
        index: place of the clip in the dataset.
        clip: its name.
        method: noisy, a baseline, or diffbuf.
        snr: input SNR, dB; None where it is not defined.
        seconds: length.
        checksum: of mix and target.
        values: column -> score.
        undefined: metric -> reason.
    """

    index: int
    clip: str
    method: str
    snr: float | None
    seconds: float
    checksum: str
    values: dict[str, float]
    undefined: dict[str, str]


@dataclass(frozen=True)
class Batch:
    """What one batch gave: its rows, and seconds of work by what they were spent on."""

    rows: list[Row]
    seconds: dict[str, float] = field(default_factory=dict)


class EvaluationFolder:
    """The files of one evaluation.

    Args:
        path: the folder; made when it is opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.arguments = self.path / "arguments.json"
        self.journal = self.path / "journal.jsonl"
        self.scores = self.path / "scores.csv"
        self.summary = self.path / "summary.json"
        self.timing = self.path / "timing.json"
        self.report = self.path / "report.html"

    def open(self, arguments: dict[str, Any]) -> list[Batch]:
        """Begin, or go on with what the same arguments have left.

        Args:
            arguments: all that the scores depend on, as JSON has it.

        Returns:
            The batches that are done.

        Raises:
            CheckpointError: the folder belongs to other arguments, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"results folder {self.path} cannot be made ({error.strerror}): choose another "
                "--results_path"
            ) from error
        if not self.arguments.exists():
            if self.journal.exists() or self.scores.exists():
                raise CheckpointError(
                    f"results folder {self.path} has scores but no arguments.json: choose another"
                )
            write_bytes(self.arguments, to_json(arguments))
        self._check(arguments)
        return list(self._read_journal())

    def append(self, batch: Batch) -> None:
        """Add a batch to the journal: a line in one write, on the disk before this returns."""
        line = json.dumps(asdict(batch)) + "\n"
        descriptor = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_scores(self, rows: Iterable[Row], metrics: Sequence[str]) -> None:
        """Write scores.csv."""
        columns = columns_of(metrics)
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*_FIXED, *columns, "undefined"])
        for row in rows:
            snr = "" if row.snr is None else row.snr
            reasons = "; ".join(f"{metric}: {why}" for metric, why in row.undefined.items())
            fixed = [row.clip, row.method, snr, row.seconds, row.checksum]
            writer.writerow([*fixed, *(row.values.get(c, "") for c in columns), reasons])
        write_bytes(self.scores, buffer.getvalue().encode())

    def _check(self, arguments: dict[str, Any]) -> None:
        try:
            before = json.loads(self.arguments.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.arguments} cannot be read: {error}") from error
        for key in arguments.keys() | before.keys():
            if before.get(key) != arguments.get(key):
                raise CheckpointError(
                    f"results folder {self.path} was begun with {key} {_short(before.get(key))}, "
                    f"and now it is {_short(arguments.get(key))}: choose another --results_path, "
                    "or give the arguments of then"
                )

    def _read_journal(self) -> Iterable[Batch]:
        """Yield the batches that are done; a last line that was cut off is removed."""
        if not self.journal.exists():
            return
        content = self.journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_bytes(self.journal, whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                yield Batch([Row(**row) for row in entry["rows"]], entry["seconds"])
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"{self.journal} line {number} is damaged ({error}): remove the line, and its "
                    "clips are scored again"
                ) from error


def read_scores(path: str | Path) -> tuple[list[str], list[Row]]:
    """Read the scores.csv of a results folder.

    Returns:
        Its columns of scores, and its rows.

    Raises:
        DataError: there is none, or it is no such file.
    """
    file = EvaluationFolder(path).scores
    try:
        lines = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
        columns = [name for name in lines[0] if name not in (*_FIXED, "undefined")]
        rows = [
            Row(
                index=index,
                clip=line["clip"],
                method=line["method"],
                snr=float(line["snr_db"]) if line["snr_db"] else None,
                seconds=float(line["seconds"]),
                checksum=line["checksum"],
                values={name: float(line[name]) for name in columns if line[name]},
                undefined=dict(_reasons(line["undefined"])),
            )
            for index, line in enumerate(lines)
        ]
    except FileNotFoundError:
        raise DataError(
            f"{path} has no scores.csv: give a folder that diffbuf evaluate --results_path wrote, "
            "and let it finish"
        ) from None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{file} is no file of scores ({error!r}): evaluate again") from error
    return columns, rows


def to_json(value: Any) -> bytes:
    """Return JSON that people can read, equal for equal values."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _reasons(text: str) -> Iterable[tuple[str, str]]:
    for part in filter(None, text.split("; ")):
        metric, _, why = part.partition(": ")
        yield metric, why


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value)) or "none"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
