"""The step debugger: one batch, one optimizer step per click, every stage open afterwards."""

from __future__ import annotations

import copy
import html
from typing import Any

import ipywidgets as widgets
import torch
from torch import Tensor

from diffbuf_lib.diagnostics.statistics import GradientStatistics, gradient_statistics
from diffbuf_lib.figures import player_wav
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.trace import Trace
from diffbuf_lib.training.feed import Stream, example_generators, stream_seed
from diffbuf_lib.training.optimizer import make_optimizer
from walk.panels import Panel, label
from walk.stages import stepping

_RUN = 10  # steps of the button "Run 10"


class StepDebugger(Panel):
    """Trains on one batch, a step at a time, and keeps every stage of the last step.

    A step is a training step in float32: `model.trace`, backward, clipping, optimizer. What is
    shown belongs together: the trace is the one whose loss was minimised, with the weights from
    before the update, and the gradients are those of that loss.

    Args:
        model: is trained in place, with the optimizer of its config.
        mix: [B, C, T] float32, full scale 1.
        target: [B, C, T] float32, full scale 1.
        lr: learning rate; None for `training.lr`.
        same_noise: use the same noise in every step, so the loss must fall to almost nothing.
        seed: of times, noise and dropout.
    """

    def __init__(
        self,
        model: DiffusionBufferModel,
        mix: Tensor,
        target: Tensor,
        *,
        lr: float | None = None,
        same_noise: bool = True,
        seed: int = 0,
    ) -> None:
        self.model, self.mix, self.target, self.seed = model, mix, target, seed
        self.optimizer = make_optimizer(model.cfg.training, model, lr)
        self._start = copy.deepcopy((model.state_dict(), self.optimizer.state_dict()))
        text = "same noise in every step"
        self.same_noise = widgets.Checkbox(value=same_noise, description=text, indent=False)
        self._begin()
        rows = self._make_widgets(len(mix))
        super().__init__(rows, "loss of one batch, gradients by module and one stage")
        self._show()

    @property
    def steps(self) -> int:
        """Optimizer steps made since the start."""
        return len(self.losses)

    @property
    def gradient_norms(self) -> dict[str, float]:
        """Gradient norms of the last step, by module with parameters; empty at step 0."""
        return {row.module: row.norm for row in self.gradients or () if row.parameters}

    def step(self, count: int = 1) -> float:
        """Make `count` optimizer steps, and show the last one; return its loss."""
        for _ in range(count):
            self._make_step()
        self._show()
        return self.losses[-1]

    def reset(self) -> None:
        """Restore the initial weights, optimizer state and noise, bit for bit."""
        weights, optimizer = copy.deepcopy(self._start)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        self.optimizer.zero_grad()
        self._begin()
        self._show()

    def noise(self) -> list[torch.Generator]:
        """Return the generators of the next step's times and noise, one per example."""
        keys = [(self._noise_key, position) for position in range(len(self.mix))]
        return example_generators(keys, self.seed, Stream.EXAMPLE, self.mix.device)

    @property
    def _noise_key(self) -> int:
        return 0 if self.same_noise.value else self.steps

    def _begin(self) -> None:
        self.losses: list[float] = []  # the first one is that of step 1
        self.gradients: GradientStatistics | None = None  # of the last step
        with torch.no_grad():
            self.trace = self._trace()

    def _make_step(self) -> None:
        self.optimizer.zero_grad()
        trace = self._trace()
        trace.loss.backward()
        self.gradients = gradient_statistics(self.model)
        limit = self.model.cfg.training.grad_clip
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.trace = trace.detach()
        self.losses.append(float(self.trace.loss))

    def _trace(self) -> Trace:
        """Pass the batch through the model, in training mode, with this step's noise."""
        devices = [self.mix.device] if self.mix.device.type == "cuda" else []
        self.model.train()
        with torch.random.fork_rng(devices=devices):  # dropout draws from the global generator
            torch.manual_seed(stream_seed(self.seed, Stream.STEP, self._noise_key))
            return self.model.trace(self.mix, self.target, self.noise())

    def _make_widgets(self, batch: int) -> list[widgets.Widget]:
        actions = {
            "step-once": ("Step", "step-forward", lambda _: self.step()),
            "back": ("Back to start", "undo", lambda _: self.reset()),
            "run-ten": (f"Run {_RUN}", "fast-forward", lambda _: self.step(_RUN)),
        }
        self.buttons: dict[str, widgets.Button] = {}
        for name, (text, icon, action) in actions.items():
            self.buttons[name] = widgets.Button(description=text, icon=icon)
            self.buttons[name].add_class(f"diffbuf-{name}")
            self.buttons[name].on_click(action)
        names = list(self.trace.stages())
        self.stage = widgets.Dropdown(options=names, value="V", description="stage")
        self.stage.add_class("diffbuf-stage")
        numbers, narrow = [(str(i + 1), i) for i in range(batch)], widgets.Layout(width="160px")
        self.example = widgets.Dropdown(options=numbers, description="example", layout=narrow)
        for control in (self.stage, self.example):
            control.observe(lambda _: self._show(), names="value")
        self.sound = widgets.Audio(autoplay=False, loop=False)
        self.step_label, self.status = label("step", "120px"), label("status", "600px")
        self.table = widgets.HTML()
        return [
            widgets.HBox([*self.buttons.values(), self.same_noise]),
            widgets.HBox([self.step_label, self.status]),
            widgets.HBox([self.stage, self.example, self.sound]),
            self.table,
        ]

    def _show(self) -> None:
        name, example, cfg = self.stage.value, self.example.value, self.model.cfg
        self.step_label.value = f"step {self.steps}"
        made = "of the last step" if self.losses else "before the first step"
        self.status.value = f"loss {float(self.trace.loss):.4g}, {made}"
        style = "font-size: 11px; line-height: 1.25; overflow-x: auto"
        self.table.value = f'<pre style="{style}">{html.escape(str(self.trace.summary()))}</pre>'
        wave = stage_wave(self.model, self.trace, name, example)
        self.sound.layout.display = "none" if wave is None else ""
        if wave is not None:
            self.sound.value = player_wav(wave, cfg.audio.sample_rate)
        norms = self.gradient_norms
        self.draw(stepping(self.losses, norms, self.trace, name, cfg, example=example))


def stage_wave(
    model: DiffusionBufferModel, trace: Trace, name: str, example: int = 0
) -> Tensor | None:
    """Return a stage as a signal [T], full scale 1; None for a stage that is not a sound.

    x0_hat covers only the buffer and is played after the clean frames before it.
    """
    value: Any = getattr(trace, name)
    if name in ("mix", "target"):
        wave: Tensor = value[example].mean(0)
        return wave
    if name == "x0_hat":
        value = torch.cat([trace.S[..., : -value.shape[-1]], value], dim=-1)
    elif name not in ("Y", "S", "V"):
        return None
    return model.spectral.inverse(value[example, None], trace.mix.shape[-1])[0]
