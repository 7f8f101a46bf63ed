"""The stream panel: feeds a recording in real time, and shows whether the machine keeps up."""

from __future__ import annotations

import time
from collections.abc import Generator

import ipywidgets as widgets
import torch
from torch import Tensor

from diffbuf_lib.errors import ShapeError
from diffbuf_lib.live import LiveHop, LiveReport, live_hops, make_report
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.streaming import OnlineEnhancer
from walk.explorers import slider_look
from walk.panels import WorkerPanel, label
from walk.plots import stream_course

_LABELS_EVERY = 0.25  # s
_QUIETEST = -60.0  # dB re full scale, where the meters end
_BUTTONS = {"start": ("play", "feed the recording from its start"), "stop": ("stop", "end here")}


class StreamPanel(WorkerPanel[LiveHop]):
    """`OnlineEnhancer` on a recording, hop by hop in real time, with Start and Stop.

    While the stream runs, only numbers and level meters move: drawing a picture takes as long as
    many hops, and would make them late. A data-prediction model can be read early: `delay` is
    a slider of the frames from a sample to its output, 1 to B.

    Args:
        model: any model.
        wave: [T], full scale 1, at the model's rate.
        realtime: feed it in real time; otherwise as fast as it can be processed.
        seed: of the diffusion noise.
    """

    def __init__(
        self, model: DiffusionBufferModel, wave: Tensor, *, realtime: bool = True, seed: int = 0
    ) -> None:
        if wave.ndim != 1 or not len(wave):
            raise ShapeError(f"StreamPanel takes a signal [T], not {list(wave.shape)}")
        self.model, self.wave, self.realtime, self.seed = model, wave, realtime, seed
        B = model.cfg.diffusion_buffer.buffer_size
        lowest = 1 if model.predicts_data else B
        self.delay = widgets.IntSlider(B, lowest, B, **slider_look("delay (frames)"))
        self.meters = {name: _meter(name) for name in ("in", "out")}
        self.status = label("status", "100%")
        self._labelled = 0.0
        self._begin()
        rows = [widgets.HBox(list(self.meters.values())), self.status]
        description = "what went into a stream, what came out, and the time of every hop"
        super().__init__(_BUTTONS, [self.delay], rows, description)
        self._show()

    @property
    def output(self) -> Tensor:
        """The output so far, [T']; at the end as long as the input."""
        return torch.cat([*(hop.ready for hop in self._hops), self._rest])

    @property
    def report(self) -> LiveReport:
        """How the stream has kept up so far."""
        hops = list(self._hops)
        times, late = [hop.milliseconds for hop in hops], sum(hop.late for hop in hops)
        return make_report(self._enhancer, times, late, self.realtime)

    def start(self) -> None:
        """Start the stream from the beginning."""
        if not self.busy:
            self.join()  # a stream that has just ended is still being flushed
            self._begin()
            super().start()

    def _begin(self) -> None:
        delay = self.delay.value if self.model.predicts_data else None
        self._enhancer = OnlineEnhancer(self.model, seed=self.seed, delay=delay)
        self._hops: list[LiveHop] = []
        self._rest = self.wave.new_zeros(0)

    def _open(self) -> Generator[LiveHop, None, None]:
        hops = self.wave.split(self.model.cfg.audio.stft.hop_length)
        return live_hops(self._enhancer, hops, realtime=self.realtime)

    def _receive(self, hop: LiveHop) -> None:
        self._hops.append(hop)
        now = time.monotonic()
        if now - self._labelled > _LABELS_EVERY:
            self._labelled = now
            self._write_labels()

    def _take_all(self) -> bool:
        stopped = super()._take_all()
        self._rest = self._enhancer.flush()
        return stopped

    def _show(self) -> None:
        busy = self.busy
        self.buttons["start"].disabled = self.delay.disabled = busy
        self.buttons["stop"].disabled = not busy
        self._write_labels()
        if not busy:
            out = self.output
            waves = {"in": self.wave[: len(out)], "out": out} if len(out) else {"in": self.wave}
            self.draw(stream_course(waves, self.report.frame_ms, self.model.cfg.audio))

    def _write_labels(self) -> None:
        report, hop = self.report, self.model.cfg.audio.stft.hop_length
        count = len(report.frame_ms)
        self.meters["in"].value = _level(self.wave[max(0, count - 1) * hop : count * hop])
        self.meters["out"].value = _level(self._hops[-1].ready if self._hops else self.wave[:0])
        text = f"latency {report.latency_ms:.0f} ms"
        if count:
            text += (
                f", {count * report.hop_ms / 1000:.1f} s; real-time factor "
                f"{report.real_time_factor:.2f}, p99 {report.quantile(0.99):.1f} of "
                f"{report.hop_ms:.0f} ms, {report.missed} hops late"
            )
        self.status.value = text


def _meter(name: str) -> widgets.FloatProgress:
    look = {"description": f"{name} (dB)", "layout": widgets.Layout(width="310px")}
    return widgets.FloatProgress(value=_QUIETEST, min=_QUIETEST, max=0.0, **look)


def _level(wave: Tensor) -> float:
    """Return the level of a piece [T] in dB re full scale, limited to the meter's range."""
    level = 10 * torch.log10(wave.square().mean() + 1e-12)  # NaN of an empty one
    return float(level.clamp(_QUIETEST, 0.0).nan_to_num(_QUIETEST))
