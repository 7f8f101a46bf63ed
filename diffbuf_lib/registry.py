"""What a config can choose from by name: losses, networks, SDEs, optimizers, metrics and more.

A new choice is one decorator, in this package or outside of it:

    from diffbuf_lib.registry import NETWORKS

    @NETWORKS.register("mine", options=MyOptions)
    class MyNetwork(nn.Module): ...

The built-in choices are listed here and imported on first use, so that checking a config and
printing the command line's help need no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeVar

from diffbuf_lib.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One choice."""

    name: str | int  # what a config calls it
    target: Any  # the object, or "module:attribute" to import it from
    options: Any  # the pydantic section of its own config keys; None if it has none
    facts: Mapping[str, Any]  # properties that its users need; each registry below lists its own

    def load(self) -> Any:
        """Return the object."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        return attrgetter(attribute)(import_module(module))


class Registry(dict[str | int, Entry]):
    """Choices by name; `key` is the config key or flag that selects one, for error messages."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def add(self, name: str | int, target: Any, *, options: Any = None, **facts: Any) -> None:
        """Add a choice, or replace the one of that name (a notebook cell runs more than once)."""
        self[name] = Entry(name, target, options, facts)

    def register(self, name: str | int, *, options: Any = None, **facts: Any) -> Callable[[T], T]:
        """Return a decorator that adds a class or function under a name."""

        def decorate(target: T) -> T:
            self.add(name, target, options=options, **facts)
            return target

        return decorate

    def __missing__(self, name: object) -> Entry:
        """Raise ConfigError with the valid names."""
        names = [str(known) for known in self]
        close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
        guess = f"; did you mean {close[0]}?" if close else ""
        fix = f"it must be {' or '.join(names)}{guess}"
        raise ConfigError(f"{self.key} = {name!r:.80} is unknown: {fix}")


# (LossInputs) -> a loss of any shape; training minimises its mean. Fact: `predicts`, data or
# score: what the network's output represents.
LOSSES = Registry("training.loss")
# (ModelConfig) -> nn.Module; see `diffbuf_lib.networks`. Fact: `many_buffers`, whether its
# forward takes the number of buffers in a clip.
NETWORKS = Registry("model.name")
SDES = Registry("sde.type")  # (**options) -> an `SDE`. Fact: `t_limit`, exclusive limit of t_max
# (parameters, lr, weight_decay, **options) -> an optimizer. Fact: `states`, how many copies of the
# weights it keeps.
OPTIMIZERS = Registry("training.optimizer")
# (estimate [T], target [T], sample_rate) -> a number. Facts, all optional: `package` it needs;
# `needs_target`; `lower_is_better`; `label` and `unit` (or range), for tables; `speech`, whether
# the target must hold speech; `shortest` clip, seconds; `sample_rates` it accepts, if not all.
METRICS = Registry("training.metrics")
TRACKERS = Registry("training.trackers")  # (Config, results folder, step) -> a `trackers.Tracker`
LAYOUTS = Registry("--dataset_type")  # a dataset class with the arguments of `DNLMDataset`
BASELINES = Registry("--baselines")  # () -> an `evaluation.baselines.Baseline`

for _name in ("score", "weighted_score", "data_prediction"):
    _predicts = "data" if _name == "data_prediction" else "score"
    LOSSES.add(_name, f"diffbuf_lib.diffusion.losses:{_name}", predicts=_predicts)
for _name, _class in (
    ("conv", "ConvNet"),
    ("ncsnpp", "NCSNpp"),
    ("block_causal", "BlockCausal"),
    ("recurrent", "Recurrent"),
    ("bc_ncsnpp", "BlockCausalNCSNpp"),
):
    _target = f"diffbuf_lib.networks.{_name}:{_class}.from_config"
    NETWORKS.add(_name, _target, many_buffers=_name == "recurrent")
for _name, _target, _states in (
    ("adam", "torch.optim:Adam", 2),
    ("adamw", "torch.optim:AdamW", 2),
    ("radam", "torch.optim:RAdam", 2),
    ("sgd", "torch.optim:SGD", 0),
    ("muon", "diffbuf_lib.training.optimizer:Muon", 1),
):
    OPTIMIZERS.add(_name, _target, states=_states)
for _name, _class in (("tensorboard", "TensorBoard"), ("wandb", "WandB"), ("trackio", "Trackio")):
    TRACKERS.add(_name, f"diffbuf_lib.training.trackers:_{_class}")
_BY_EAR: dict[str, Any] = {"speech": True, "shortest": 0.25, "sample_rates": (16000,)}
for _name, _label, _unit, _facts in (
    ("si_sdr", "SI-SDR", "dB", {}),
    ("sdr", "SDR", "dB", {}),
    ("pesq", "PESQ", "1 to 4.6", {**_BY_EAR, "package": "pesq", "sample_rates": (8000, 16000)}),
    ("estoi", "ESTOI", "0 to 1", {"speech": True, "package": "pystoi", "shortest": 0.4}),
):
    _target = f"diffbuf_lib.training.metrics:{_name}"
    METRICS.add(_name, _target, label=_label, unit=_unit, needs_target=True, **_facts)
for _name, _label, _package in (
    ("distillmos", "DistillMOS", "distillmos"),
    ("dnsmos_ovrl", "DNSMOS overall", "speechmos"),
    ("dnsmos_sig", "DNSMOS signal", "speechmos"),
    ("dnsmos_bak", "DNSMOS background", "speechmos"),
    ("dnsmos_p808", "DNSMOS P.808", "speechmos"),
):
    _target = f"diffbuf_lib.evaluation.scores:{_name}"
    METRICS.add(_name, _target, label=_label, unit="1 to 5", package=_package, **_BY_EAR)
METRICS.add(
    "lps", "diffbuf_lib.evaluation.scores:lps", label="LPS", unit="phonemes, at most 1",
    package="pocketsphinx", needs_target=True, **_BY_EAR,
)  # fmt: skip
for _name, _target in (
    ("noisereduce", "SpectralGate"),
    ("noisereduce_nonstationary", "nonstationary_gate"),
    ("deepfilternet", "DeepFilterNet"),
    ("rnnoise", "RNNoise"),
    ("gtcrn", "GTCRN"),
):
    BASELINES.add(_name, f"diffbuf_lib.evaluation.baselines:{_target}")
