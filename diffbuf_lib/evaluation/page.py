"""One HTML page of an evaluation: tables, gains by input SNR, and clips to hear and see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffbuf_lib import figures
from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.evaluation import tables
from diffbuf_lib.evaluation.baselines import NOISY
from diffbuf_lib.evaluation.clips import Clip
from diffbuf_lib.evaluation.pictures import gains_by_band
from diffbuf_lib.evaluation.results import Row
from diffbuf_lib.evaluation.scoring import LABELS
from diffbuf_lib.evaluation.work import OURS, Worker
from diffbuf_lib.report import PAGES, STYLE, data_uri, player_wav, versions


def write_page(
    path: str | Path,
    worker: Worker,
    rows: Sequence[Row],
    summary: Mapping[str, Any],
    timing: Mapping[str, Any],
) -> None:
    """Write a page that needs no other file.

    Args:
        path: of the page.
        worker: enhances the clips that are shown once more.
        rows: of every clip and method.
        summary: the content of summary.json.
        timing: the content of timing.json.
    """
    columns = list(summary["bands"]["all"]["columns"])
    column = columns[0]
    examples = choose_examples(rows, column)
    clips = [worker.clips[index] for _, index, _ in examples]
    found = dict(worker.estimates(clips)) if clips else {}
    page = _PAGE.render(
        style=STYLE,
        summary=summary,
        timing=timing,
        columns=columns,
        column=column,
        labels=LABELS,
        cell=tables.cell,
        picture=_png(gains_by_band(summary, columns[:3])) if len(summary["bands"]) > 1 else None,
        clips=[
            _shown(worker, clip, {method: waves[place] for method, waves in found.items()})
            | {"what": what, "gain": gain, "scores": [row for row in rows if row.index == index]}
            for place, (clip, (what, index, gain)) in enumerate(zip(clips, examples, strict=True))
        ],
        versions=versions(),
    )
    write_bytes(path, page.encode())


def choose_examples(
    rows: Sequence[Row], column: str, ours: str = OURS
) -> list[tuple[str, int, float]]:
    """Choose the clips with the largest, the median and the smallest gain.

    Args:
        rows: of every clip and method.
        column: the score whose gain over the noisy input counts.
        ours: the method whose gain it is.

    Returns:
        What it is, index of the clip, its gain; fewer than three if there are fewer clips.
    """
    scores = {(row.method, row.index): row.values[column] for row in rows if column in row.values}
    gains = sorted(
        (value - scores[NOISY, index], index)
        for (method, index), value in scores.items()
        if method == ours and (NOISY, index) in scores
    )
    if not gains:
        return []
    places = {"best": len(gains) - 1, "median": (len(gains) - 1) // 2, "worst": 0}
    chosen: dict[int, tuple[str, int, float]] = {}
    for what, place in places.items():
        gain, index = gains[place]
        chosen.setdefault(index, (what, index, gain))
    return list(chosen.values())


def _shown(worker: Worker, clip: Clip, estimates: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return name, players and spectrograms of one clip."""
    rate = worker.clips.rate
    waves = {**estimates, "clean": clip.target}
    return {
        "name": clip.name,
        "snr": clip.snr,
        "picture": _png(figures.spectrograms(waves, rate, worker.model.cfg.audio.stft)),
        "players": [
            (name, data_uri(player_wav(wave, rate), "audio/wav")) for name, wave in waves.items()
        ],
    }


def _png(figure: Any) -> str:
    return data_uri(figures.to_png(figure), "image/png")


_PAGE = PAGES.from_string(
    """{% import "parts" as parts %}
{{ parts.head("diffbuf evaluation", style) }}
<h1>Evaluation of {{ timing.model }}</h1>
<p>{{ summary.clips }} clips of {{ timing.data }}, {{ "%.0f" % timing.audio_seconds }} s in all;
{{ "{:,}".format(timing.parameters) }} parameters. In brackets: {{ summary.interval }}. A metric's
numbers are over the clips for which every method has a score.</p>
<h2>All clips</h2>
<div class="wide"><table>
<tr><th></th>{% for c in columns %}<th>{{ labels[c] }}</th>{% endfor %}</tr>
{% for method in summary.methods %}
<tr><td>{{ method }}</td>
{% for c in columns %}
<td>{{ cell(summary.bands["all"]["columns"][c].methods[method].mean) }}</td>
{% endfor %}
</tr>
{% endfor %}
<tr><td>clips scored</td>{% for c in columns %}
<td>{{ summary.bands["all"]["columns"][c].clips }}</td>{% endfor %}</tr>
</table></div>
<h2>By input SNR</h2>
{% if picture %}
<p><img src="{{ picture }}" alt="gain over the noisy input against input SNR"></p>
{% endif %}
{% for c in columns %}
<h3>Gain in {{ labels[c] }}</h3>
<div class="wide"><table>
<tr><th>input SNR</th>{% for method in summary.methods[1:] %}<th>{{ method }}</th>{% endfor %}
<th>clips scored</th></tr>
{% for name, band in summary.bands.items() %}
<tr><td>{{ name }}</td>{% for method in summary.methods[1:] %}
<td>{{ cell(band["columns"][c].methods[method].gain, signed=true) }}</td>{% endfor %}
<td>{{ band["columns"][c].clips }} of {{ band.clips }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
<h2>Clips</h2>
{% for clip in clips %}
<h3>{{ clip.what|capitalize }}: {{ "%+.2f" % clip.gain }} gain in {{ labels[column] }}</h3>
<p class="name">{{ clip.name }}{% if clip.snr is not none %}, input SNR
{{ "%.1f" % clip.snr }} dB{% endif %}</p>
{{ parts.players(clip.players) }}
<p><img src="{{ clip.picture }}" alt="spectrograms of every method and of the clean signal"></p>
<div class="wide"><table>
<tr><th></th>{% for c in columns %}<th>{{ labels[c] }}</th>{% endfor %}</tr>
{% for row in clip.scores %}
<tr><td>{{ row.method }}</td>{% for c in columns %}
<td>{{ "%.2f" % row["values"][c] if c in row["values"] else "not defined" }}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
{% else %}
<p>No clip has a score in {{ labels[column] }}, so there is no best or worst.</p>
{% endfor %}
<p>Every player is scaled to the same peak. Scores are of the unscaled signals.</p>
<h2>Not scored</h2>
{% if summary.undefined %}
<div class="wide"><table>
<tr><th>clip</th><th>method</th><th>metric</th><th>reason</th></tr>
{% for entry in summary.undefined %}
<tr><td>{{ entry.clip }}</td><td>{{ entry.method }}</td><td>{{ entry.metric }}</td>
<td>{{ entry.reason }}</td></tr>
{% endfor %}
</table></div>
{% else %}
<p>Every clip has every score.</p>
{% endif %}
<h2>Speed</h2>
<p>Real-time factor and latency of a stream on this machine, beside whatever else it was doing; for
baselines, of whole clips in the evaluation.</p>
<table>
<tr><th></th><th>real-time factor</th><th>latency</th></tr>
{% for method, time in timing.methods.items() %}
<tr><td>{{ method }}</td><td>{{ "%.3f" % time.real_time_factor }}</td>
<td>{{ "whole clip" if time.latency_ms is none else "%.0f ms" % time.latency_ms }}</td></tr>
{% endfor %}
</table>
<table>
<tr><th>work</th><th>seconds of all processes</th></tr>
{% for name, seconds in timing.seconds.items()|sort(attribute="1", reverse=true) %}
<tr><td>{{ name }}</td><td>{{ "%.1f" % seconds }}</td></tr>
{% endfor %}
</table>
{{ parts.version_table(versions) }}
</html>
"""
)
