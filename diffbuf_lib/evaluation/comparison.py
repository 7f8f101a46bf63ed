"""Compare two evaluations clip by clip: what `diffbuf compare a b` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffbuf_lib.errors import DataError
from diffbuf_lib.evaluation.results import Row, read_scores
from diffbuf_lib.evaluation.scoring import LABELS
from diffbuf_lib.evaluation.statistics import Interval, bootstrap, group
from diffbuf_lib.evaluation.tables import render
from diffbuf_lib.evaluation.work import OURS

_NAMED = 5


@dataclass(frozen=True)
class Difference:
    """How two evaluations differ in one metric on one band of clips.

    Attributes:
        column: of the scores.
        band: of input SNR; "all" for all clips.
        a: mean of the first, over the clips for which both have a score.
        b: mean of the second.
        difference: b - a, paired clip by clip; None if no clip has both scores.
        better: share of clips for which b is above a.
        clips: how many there are in the band, scored or not.
    """

    column: str
    band: str
    a: float | None
    b: float | None
    difference: Interval | None
    better: float
    clips: int


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
    (columns_a, rows_a), (columns_b, rows_b) = (_read(path, method) for path in (a, b))
    _check_same_clips(a, b, rows_a, rows_b)
    columns = [column for column in columns_a if column in columns_b]
    if not columns:
        raise DataError(
            f"{a} has {', '.join(columns_a)} and {b} has {', '.join(columns_b)}: evaluate them "
            "with a metric in common"
        )
    bands = group({clip: row.snr for clip, row in rows_a.items()})
    return [
        _difference(column, band, clips, rows_a, rows_b, seed)
        for column in columns
        for band, clips in bands.items()
    ]


def render_differences(found: Sequence[Difference]) -> str:
    """Return the differences as a table for a terminal."""
    rows = [["", "input SNR", "a", "b", "b - a", "b above a", "clips"]]
    for row in found:
        if row.difference is None or row.a is None or row.b is None:
            shown = ["-"] * 4
        else:
            sign = "+" if row.difference.mean >= 0 else ""
            means = [f"{row.a:.2f}", f"{row.b:.2f}"]
            shown = [*means, f"{sign}{row.difference}", f"{row.better:.0%}"]
        scored = row.difference.clips if row.difference else 0
        label = LABELS.get(row.column, row.column)
        rows.append([label, row.band, *shown, f"{scored} of {row.clips}"])
    return render(rows)


def _difference(
    column: str,
    band: str,
    clips: Sequence[str],
    rows_a: Mapping[str, Row],
    rows_b: Mapping[str, Row],
    seed: int,
) -> Difference:
    pairs = [
        (rows_a[clip].values[column], rows_b[clip].values[column])
        for clip in clips
        if column in rows_a[clip].values and column in rows_b[clip].values
    ]
    count = max(len(pairs), 1)
    return Difference(
        column=column,
        band=band,
        a=sum(one for one, _ in pairs) / count if pairs else None,
        b=sum(other for _, other in pairs) / count if pairs else None,
        difference=bootstrap((other - one for one, other in pairs), seed=seed),
        better=sum(other > one for one, other in pairs) / count,
        clips=len(clips),
    )


def _read(path: str | Path, method: str) -> tuple[list[str], dict[str, Row]]:
    columns, rows = read_scores(path)
    chosen = {row.clip: row for row in rows if row.method == method}
    if not chosen:
        known = ", ".join(dict.fromkeys(row.method for row in rows))
        raise DataError(f"{path} has no method {method!r}: it has {known}")
    return columns, chosen


def _check_same_clips(
    a: str | Path, b: str | Path, rows_a: Mapping[str, Row], rows_b: Mapping[str, Row]
) -> None:
    """Refuse a comparison of unlike with unlike."""
    for one, other, missing in ((rows_a, rows_b, b), (rows_b, rows_a, a)):
        if alone := sorted(one.keys() - other.keys()):
            raise DataError(f"{missing} lacks {_named(alone)}: evaluate both on the same clips")
    changed = [clip for clip, row in rows_a.items() if row.checksum != rows_b[clip].checksum]
    if changed:
        raise DataError(
            f"{_named(changed)} are not the same sound in {a} and {b}: evaluate both on the same "
            "data, with the same --seconds"
        )


def _named(clips: Sequence[str]) -> str:
    more = f" and {len(clips) - _NAMED} more" if len(clips) > _NAMED else ""
    return f"{', '.join(clips[:_NAMED])}{more}"
