"""Sounds in a page: wav files as text, and a row of players for a notebook."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping

import soundfile
import torch
from torch import Tensor

PEAK = 0.9  # of full scale; quiet speech beside loud noise could not be heard otherwise
_LOWEST_PEAK = 1e-4  # what is quieter is not raised to PEAK: it is silence


class Players:
    """Signals to listen to side by side; Jupyter shows a row of players with captions.

    Args:
        waves: caption and signal [T], full scale 1. All are played at one peak; the caption says
            by how many dB that raised them.
        sample_rate: Hz.
    """

    def __init__(self, waves: Mapping[str, Tensor], sample_rate: int) -> None:
        self.waves, self.sample_rate = dict(waves), sample_rate

    def __repr__(self) -> str:
        return f"<players: {', '.join(self.waves)}>"

    def _repr_html_(self) -> str:
        rows = []
        for caption, wave in self.waves.items():
            gain = 20 * _gain(wave).log10()
            source = data_uri(player_wav(wave, self.sample_rate), "audio/wav")
            rows.append(
                '<figure style="margin:0"><figcaption style="padding:0 0 .3em .5em">'
                f"{html.escape(caption)} <small>({gain:+.0f} dB)</small></figcaption>"
                f'<audio controls style="width:17em;max-width:100%" src="{source}"></audio>'
                "</figure>"
            )
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{"".join(rows)}</div>'


def player_wav(wave: Tensor, sample_rate: int) -> bytes:
    """Return a 16-bit wav file at 0.9 of full scale; samples that are not finite are silent.

    Args:
        wave: [T], full scale 1.
        sample_rate: Hz.
    """
    buffer = io.BytesIO()
    samples = (_gain(wave) * _finite(wave)).numpy()
    soundfile.write(buffer, samples, sample_rate, format="WAV")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Return a file's content as an address that a page can hold; kind is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _gain(wave: Tensor) -> Tensor:
    return PEAK / _finite(wave).abs().max().clamp_min(_LOWEST_PEAK)


def _finite(wave: Tensor) -> Tensor:
    return torch.nan_to_num(wave.detach().float().cpu(), posinf=0, neginf=0)
