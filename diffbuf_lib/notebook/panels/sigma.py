"""The sigma explorer: sliders for the noise schedule of BBED."""

from __future__ import annotations

import math
from typing import Any

import ipywidgets as widgets

from diffbuf_lib.config import BBEDDiffusion, Config
from diffbuf_lib.diagnostics.checks_run import check_schedule
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.notebook.panels.base import Panel
from diffbuf_lib.notebook.panels.controls import Messages, slider_look
from diffbuf_lib.notebook.plots.schedule import noise_schedule

_VALUES = (0.005, 2.0)  # of c or theta
_SMALLEST_EXPONENT = -10  # of t_eps, base 10


class SigmaExplorer(Panel):
    """Moves k, c or theta, t_eps and t_max, and shows sigma, mean, g and 1 / sigma.

    Beside the curves of the sliders stands the schedule of the config, dashed. A config with OUVE
    starts the sliders at BBED's defaults.

    Args:
        cfg: where the sliders start.

    Attributes:
        spelling: "theta" or "c": what `sliders["value"]` is called in the config.
        sliders: value, k, t_eps, t_max; set `.value` to move one.
        cfg: the config at the sliders' positions, or None while they contradict each other.
    """

    def __init__(self, cfg: Config) -> None:
        self._start = cfg
        self.cfg: Config | None = None
        self._messages = Messages()
        bbed = cfg.sde.diffusion if cfg.sde.type == "bbed" else BBEDDiffusion()
        spelling = "theta" if bbed.c is None else "c"
        self.spelling = widgets.ToggleButtons(
            options=["theta", "c"],
            value=spelling,
            description="spelling",
            style={"description_width": "80px", "button_width": "70px"},
        )
        value = bbed.c or bbed.theta or 0.08
        self.sliders = _sliders(value, bbed.k, cfg)
        sliders = list(self.sliders.values())
        rows = [widgets.HBox(sliders[:2]), widgets.HBox(sliders[2:])]
        super().__init__(
            [self.spelling, *rows, self._messages.widget],
            "sigma, mean, g and 1 / sigma over diffusion time",
        )
        for widget in (self.spelling, *sliders):
            widget.observe(self._changed, names="value")
        self._changed()

    @property
    def messages(self) -> list[str]:
        """What the doctor says about sigma and score targets, or the error."""
        return self._messages.lines

    def _changed(self, _: Any = None) -> None:
        """Take the sliders' values, and show what follows from them."""
        value = {name: slider.value for name, slider in self.sliders.items()}
        diffusion = f"{{k: {value['k']}, {self.spelling.value}: {value['value']}}}"
        times = [f"diffusion_buffer.{name}={value[name]}" for name in ("t_eps", "t_max")]
        try:
            self.cfg = self._start.override(f"sde={{type: bbed, diffusion: {diffusion}}}", *times)
        except ConfigError as error:
            self.cfg = None
            self._messages.show_error(error)
            self.draw(
                noise_schedule(
                    {"config": make_sde(self._start.sde)}, value["t_eps"], value["t_max"]
                )
            )
            return
        self._messages.show(check_schedule(self.cfg))
        name = f"sliders: {self.spelling.value} = {value['value']:.3g}, k = {value['k']:.3g}"
        sdes = {name: make_sde(self.cfg.sde), "config": make_sde(self._start.sde)}
        self.draw(noise_schedule(sdes, value["t_eps"], value["t_max"]))


def _sliders(value: float, k: float, cfg: Config) -> dict[str, Any]:
    """Make a slider for each value, whose range holds the config's own."""
    t_eps, t_max = cfg.diffusion_buffer.t_eps, cfg.diffusion_buffer.t_max
    ranges = {
        "value": ("c or theta", value, *_VALUES, 0.005),
        "k": ("k", k, 1.1, 10.0, 0.1),
        "t_max": ("t_max", t_max, 0.1, 1.0, 0.005),
    }
    sliders = {
        name: widgets.FloatSlider(
            value=start,
            min=min(low, start),
            max=max(high, start),
            step=step,
            readout_format=".3f",
            **slider_look(text, 400),
        )
        for name, (text, start, low, high, step) in ranges.items()
    }
    # Logarithmic: float16 ends at times that a linear slider cannot reach.
    lowest = min(_SMALLEST_EXPONENT, math.log10(t_eps))
    sliders["t_eps"] = widgets.FloatLogSlider(
        value=t_eps, min=lowest, max=0, step=0.05, readout_format=".2g", **slider_look("t_eps", 400)
    )
    return sliders
