"""Compare two evaluations clip by clip: what `diffbuf compare a b` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffbuf_lib.errors import DataError
from diffbuf_lib.evaluation.bootstrap import Interval, bootstrap, group
from diffbuf_lib.evaluation.evaluate import OURS
from diffbuf_lib.evaluation.results import Row, read_scores
from diffbuf_lib.evaluation.scores import label_of
from diffbuf_lib.trace import format_table

_NAMED = 5


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
