"""A run and what it does to a few clips, on one page that needs no other file."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import soundfile
import torch
from torch import Tensor

from diffbuf_lib import figures
from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.evaluation import ScoredClip, summary
from diffbuf_lib.evaluation.scoring import LABELS
from diffbuf_lib.training.results import ResultsFolder, read_history

STYLE = """
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
         padding: 0 1rem; color: #1a1a1a; background: #fff; }
  h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
  img { max-width: 100%; height: auto; }
  table { border-collapse: collapse; margin: 1rem 0; }
  th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd; }
  th:first-child, td:first-child { text-align: left; }
  .players { display: flex; flex-wrap: wrap; gap: 1rem; }
  .players figure { margin: 0; } figcaption { font-size: .85rem; }
  audio { width: 18rem; max-width: 100%; }
  pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem; }
  .wide { overflow-x: auto; } .wide td { white-space: nowrap; }
  .name { color: #555; font-size: .85rem; overflow-wrap: anywhere; }
"""


def write_report(
    path: str | Path,
    cfg: Config,
    results_path: str | Path,
    clips: Sequence[ScoredClip],
    *,
    title: str,
    notes: Sequence[str] = (),
) -> None:
    """Write one HTML page: loss curve, validation, spectrograms, players, scores, versions.

    Args:
        path: of the page.
        cfg: the run's config.
        results_path: the run's folder, for its history.
        clips: enhanced clips to show and to average.
        title: heading of the page.
        notes: sentences below the heading.
    """
    metrics = list(clips[0].enhanced) if clips else []
    history = list(read_history(ResultsFolder(results_path).history))
    page = _PAGE.render(
        style=STYLE,
        title=title,
        notes=notes,
        rows=summary(clips, metrics),
        labels=LABELS,
        curves=[data_uri(figures.to_png(figure), "image/png") for figure in _curves(cfg, history)],
        clips=[_shown(clip, cfg) for clip in clips],
        metrics=[LABELS[metric] for metric in metrics],
        config=cfg.to_yaml(),
        versions=versions(),
    )
    write_bytes(path, page.encode())


def _curves(cfg: Config, history: Sequence[dict[str, Any]]) -> list[Any]:
    steps = [line for line in history if line.get("loss") is not None]
    shown = []
    if steps:
        x, loss = [line["step"] for line in steps], [line["loss"] for line in steps]
        window = max(1, len(loss) // 30)
        series = [("each step", x, loss)]
        if window > 1:
            series.append((f"mean of {window} steps", x, figures.smooth(loss, window)))
        shown.append(
            figures.curves(
                series, xlabel="step", ylabel=f"{cfg.training.loss} loss", log=min(loss) > 0
            )
        )
    name = cfg.training.metrics[0]
    valid = [line for line in history if (line.get("valid") or {}).get(name) is not None]
    if valid:
        x, y = [line["step"] for line in valid], [line["valid"][name] for line in valid]
        shown.append(
            figures.curves([(name, x, y)], xlabel="step", ylabel=f"validation {LABELS[name]}")
        )
    return shown


def _shown(clip: ScoredClip, cfg: Config) -> dict[str, Any]:
    waves = {"mix (noisy)": clip.mix, "target (clean)": clip.target, "estimate": clip.estimate}
    rate = cfg.audio.sample_rate
    picture = figures.spectrograms(waves, rate, cfg.audio.stft)
    return {
        "name": clip.name,
        "picture": data_uri(figures.to_png(picture), "image/png"),
        "players": [
            (name, data_uri(player_wav(wave, rate), "audio/wav")) for name, wave in waves.items()
        ],
        "noisy": list(clip.noisy.values()),
        "enhanced": list(clip.enhanced.values()),
    }


def player_wav(wave: Tensor, sample_rate: int) -> bytes:
    """Return a 16-bit wav at 0.9 of full scale, so that quiet speech can be heard."""
    wave = torch.nan_to_num(wave)
    buffer = io.BytesIO()
    peak = wave.abs().max().clamp_min(1e-8)
    soundfile.write(buffer, (0.9 * wave / peak).numpy(), sample_rate, format="WAV")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Return a file's content as an address that a page can hold; kind is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def versions() -> list[tuple[str, str]]:
    """Return name and version of what results depend on."""
    packages = ("diffbuf", "torch", "torchaudio", "accelerate", "torchmetrics", "numpy")
    return [
        ("python", platform.python_version()),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        *((name, metadata.version(name)) for name in packages),
    ]


_PARTS = """
{% macro head(title, style) %}
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style|safe }}</style>
{% endmacro %}
{% macro players(sounds) %}
<div class="players">
{% for name, sound in sounds %}
<figure><figcaption>{{ name }}</figcaption><audio controls src="{{ sound }}"></audio></figure>
{% endfor %}
</div>
{% endmacro %}
{% macro version_table(versions) %}
<h2>Versions</h2>
<table>
{% for name, version in versions %}<tr><td>{{ name }}</td><td>{{ version }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
"""

PAGES = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=jinja2.DictLoader({"parts": _PARTS}),
)
"""Makes pages; what they share is imported with `{% import "parts" as parts %}`."""

_PAGE = PAGES.from_string(
    """{% import "parts" as parts %}
{{ parts.head(title, style) }}
<h1>{{ title }}</h1>
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}
<h2>Scores</h2>
<table>
<tr><th>mean over the clips below</th><th>noisy</th><th>enhanced</th><th>gain</th>
<th>clips scored</th></tr>
{% for row in rows %}
<tr><td>{{ labels[row.metric] }}</td><td>{{ "%.2f" % row.noisy }}</td>
<td>{{ "%.2f" % row.enhanced }}</td>
<td>{{ "%+.2f" % row.gain }}</td><td>{{ row.scored }} of {{ row.clips }}</td></tr>
{% endfor %}
</table>
<h2>Training</h2>
{% for curve in curves %}<p><img src="{{ curve }}" alt="training curve"></p>
{% endfor %}
<h2>Clips</h2>
{% for clip in clips %}
<h3>{{ loop.index }}</h3>
<p class="name">{{ clip.name }}</p>
{{ parts.players(clip.players) }}
<p><img src="{{ clip.picture }}" alt="spectrograms of mix, target and estimate"></p>
<table>
<tr><th></th>{% for metric in metrics %}<th>{{ metric }}</th>{% endfor %}</tr>
<tr><td>noisy</td>{% for value in clip.noisy %}<td>{{ "%.2f" % value }}</td>{% endfor %}</tr>
<tr><td>enhanced</td>{% for value in clip.enhanced %}<td>{{ "%.2f" % value }}</td>{% endfor %}</tr>
</table>
{% endfor %}
<p>Every player is scaled to the same peak. Scores are of the unscaled signals.</p>
<h2>Config</h2>
<pre>{{ config }}</pre>
{{ parts.version_table(versions) }}
</html>
"""
)
