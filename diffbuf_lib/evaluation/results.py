"""The results folder of an evaluation, which survives being stopped; and two of them compared.

    RESULTS/
      arguments.json   what was asked for; a rerun with other arguments is refused
      journal.jsonl    a line a batch of clips: what a rerun need not do again
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.errors import CheckpointError, DataError
from diffbuf_lib.evaluation.baselines import NOISY
from diffbuf_lib.evaluation.bootstrap import (
    LEVEL,
    RESAMPLES,
    Interval,
    bootstrap,
    compare_methods,
    group,
)
from diffbuf_lib.evaluation.evaluate import OURS
from diffbuf_lib.evaluation.scores import label_of
from diffbuf_lib.trace import format_table

_FIXED = ("clip", "method", "snr_db", "seconds", "checksum")
_NAMED = 5


@dataclass(frozen=True)
class Row:
    """One clip as one method left it."""

    index: int  # place of the clip in the dataset
    clip: str
    method: str  # noisy, a baseline, or diffbuf
    snr: float | None  # of the input, dB; None where it is undefined
    seconds: float
    checksum: str  # of mix and target
    values: dict[str, float]  # of every column that is defined
    undefined: dict[str, str]  # metric -> reason


@dataclass(frozen=True)
class Batch:
    """What one batch gave: its rows, and seconds of work by what they were spent on."""

    rows: list[Row]
    seconds: dict[str, float]


class EvaluationFolder:
    """The files of one evaluation."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.arguments = self.path / "arguments.json"
        self.journal = self.path / "journal.jsonl"
        self.scores = self.path / "scores.csv"
        self.summary = self.path / "summary.json"
        self.timing = self.path / "timing.json"
        self.report = self.path / "report.html"

    def open(self, arguments: dict[str, Any]) -> list[Batch]:
        """Begin, or go on: return the batches that are done with the same arguments.

        Raises:
            CheckpointError: the folder belongs to other arguments, or its files are damaged.
        """
        if not self.arguments.exists() and not self.journal.exists():
            write_json(self.arguments, arguments)
        try:
            before = json.loads(self.arguments.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.arguments} cannot be read: {error}") from error
        for key in arguments.keys() | before.keys():
            if before.get(key) != arguments.get(key):
                raise CheckpointError(
                    f"results folder {self.path} was begun with {key} {before.get(key)!s:.80}, and "
                    f"now it is {arguments.get(key)!s:.80}: choose another --results_path, or give "
                    "the arguments of then"
                )
        return list(self._read_journal())

    def append(self, batch: Batch) -> None:
        """Add a batch to the journal: it is on the disk before this returns."""
        with open(self.journal, "ab") as file:
            file.write((json.dumps(asdict(batch)) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def write_scores(self, rows: Iterable[Row], metrics: Sequence[str]) -> None:
        """Write scores.csv."""
        buffer = io.StringIO()
        names = [*_FIXED, *metrics, "undefined"]
        writer = csv.DictWriter(buffer, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            reasons = "; ".join(f"{metric}: {why}" for metric, why in row.undefined.items())
            fixed = (row.clip, row.method, row.snr, row.seconds, row.checksum)
            line = dict(zip(_FIXED, fixed, strict=True))
            writer.writerow(line | row.values | {"undefined": reasons})
        write_bytes(self.scores, buffer.getvalue().encode())

    def _read_journal(self) -> Iterable[Batch]:
        """Yield the batches that are done; a last line that was cut off is removed."""
        content = self.journal.read_bytes() if self.journal.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_bytes(self.journal, whole)
        for entry in map(json.loads, whole.splitlines()):
            yield Batch([Row(**row) for row in entry["rows"]], entry["seconds"])


def read_scores(path: str | Path) -> tuple[list[str], list[Row]]:
    """Return the columns of scores, and the rows, of a results folder's scores.csv.

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
                undefined=dict(
                    part.split(": ", 1) for part in line["undefined"].split("; ") if part
                ),
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


def summarise(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Any]:
    """Sum up rows: the content of summary.json.

    A metric's numbers are over the clips for which every method has a score, so that all are
    compared on the same clips.
    """
    snrs = {row.clip: row.snr for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    tables: dict[str, dict[str, dict[str, float]]] = {
        column: {method: {} for method in methods} for column in columns
    }
    for row in rows:
        for column, value in row.values.items():
            tables[column][row.method][row.clip] = value
    return {
        "clips": len(snrs),
        "methods": methods,
        "interval": f"{LEVEL:.0%} percentile bootstrap over clips, {RESAMPLES} resamples",
        "bands": {
            name: {
                "clips": len(clips),
                "columns": {
                    column: _plain(compare_methods(table, clips, ours=OURS, noisy=NOISY))
                    for column, table in tables.items()
                },
            }
            for name, clips in group(snrs).items()
        },
        "undefined": [
            {"clip": row.clip, "method": row.method, "metric": metric, "reason": reason}
            for row in rows
            for metric, reason in row.undefined.items()
        ],
    }


@dataclass(frozen=True)
class Difference:
    """How two evaluations differ in one metric on one band of clips."""

    column: str
    band: str  # of input SNR; "all" for all clips
    a: float | None  # mean over the clips for which both have a score
    b: float | None
    difference: Interval | None  # b - a, paired clip by clip
    better: float  # share of clips for which b is above a
    clips: int  # in the band, scored or not


def compare_folders(
    a: str | Path, b: str | Path, *, method: str = OURS, seed: int = 0
) -> list[Difference]:
    """Compare one method in two results folders, for every metric that both have.

    Args:
        a: results folder of `diffbuf evaluate`.
        b: another, of the same clips.
        method: noisy, a baseline or diffbuf.
        seed: of the bootstrap.

    Raises:
        DataError: no such folder or method, no metric in common, or other clips; the message names
            clips that differ.
    """
    (columns_a, rows_a), (columns_b, rows_b) = (_rows_of(path, method) for path in (a, b))
    for one, other, path in ((rows_a, rows_b, b), (rows_b, rows_a, a)):
        if alone := sorted(one.keys() - other.keys()):
            raise DataError(f"{path} lacks {_some(alone)}: evaluate both on the same clips")
    changed = [clip for clip, row in rows_a.items() if row.checksum != rows_b[clip].checksum]
    if changed:
        raise DataError(
            f"{_some(changed)} are not the same sound in {a} and {b}: evaluate both on the same "
            "data, with the same --seconds"
        )
    columns = [column for column in columns_a if column in columns_b]
    if not columns:
        raise DataError(f"{a} and {b} have no metric in common: evaluate both with the same ones")
    found = []
    for column in columns:
        for band, clips in group({clip: row.snr for clip, row in rows_a.items()}).items():
            scores = [(rows_a[clip].values, rows_b[clip].values) for clip in clips]
            pairs = [(x[column], y[column]) for x, y in scores if column in x and column in y]
            found.append(_difference(column, band, pairs, len(clips), seed))
    return found


def render_differences(found: Sequence[Difference]) -> str:
    """Return the differences as a table for a terminal."""
    rows = [["", "input SNR", "a", "b", "b - a", "b above a", "clips"]]
    for row in found:
        shown, scored = ["-"] * 4, 0
        if row.difference is not None:
            scored = row.difference.clips
            sign = "+" if row.difference.mean >= 0 else ""
            means = [f"{row.a:.2f}", f"{row.b:.2f}"]
            shown = [*means, f"{sign}{row.difference}", f"{row.better:.0%}"]
        rows.append([label_of(row.column), row.band, *shown, f"{scored} of {row.clips}"])
    return format_table(rows)


def _difference(
    column: str, band: str, pairs: Sequence[tuple[float, float]], clips: int, seed: int
) -> Difference:
    count = max(len(pairs), 1)
    return Difference(
        column=column,
        band=band,
        a=sum(one for one, _ in pairs) / count if pairs else None,
        b=sum(other for _, other in pairs) / count if pairs else None,
        difference=bootstrap((other - one for one, other in pairs), seed=seed),
        better=sum(other > one for one, other in pairs) / count,
        clips=clips,
    )


def _rows_of(path: str | Path, method: str) -> tuple[list[str], dict[str, Row]]:
    columns, rows = read_scores(path)
    chosen = {row.clip: row for row in rows if row.method == method}
    if not chosen:
        known = ", ".join(dict.fromkeys(row.method for row in rows))
        raise DataError(f"{path} has no method {method!r}: it has {known}")
    return columns, chosen


def _some(clips: Sequence[str]) -> str:
    more = f" and {len(clips) - _NAMED} more" if len(clips) > _NAMED else ""
    return f"{', '.join(clips[:_NAMED])}{more}"


def write_json(path: Path, value: Any) -> None:
    """Write JSON that people can read, equal for equal values."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table of `compare_methods` as JSON has it."""
    methods = {
        method: {name: x._asdict() if x else None for name, x in found.items()}
        for method, found in table["methods"].items()
    }
    return {"clips": table["clips"], "methods": methods}
