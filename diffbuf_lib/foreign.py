"""Configs of Music-Source-Separation-Training, with which many train the Diffusion Buffer.

`load_config` takes such a file as it is: `TABLE` says what becomes of each of its keys, and
`Translation.report` what was taken as what. A key that is in neither project's list is told and
left out, never guessed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml


class Row(NamedTuple):
    """What becomes of one key of theirs."""

    ours: str = ""  # the key here, which gets the same value if there is no `make`
    why: str = ""  # what is different; without `ours`, why the key has no meaning here
    make: Callable[[Any], Any] | None = None


_PAIRS = "a clip is a pair of files: mixture and vocals"
_OUTLIERS = "no clip is left out of a loss for being an outlier"
_ALWAYS = "always so here"

TABLE: dict[str, Row] = {
    "audio.n_fft": Row("audio.stft.n_fft"),
    "audio.hop_length": Row("audio.stft.hop_length"),
    "audio.num_channels": Row(why="channels are averaged to one"),
    "audio.min_mean_abs": Row(why="no clip is drawn again for being quiet"),
    "audio.stft.window": Row("audio.stft.window", "", lambda v: str(v).removesuffix("_periodic")),
    "model.name": Row("model.name", "", lambda v: "ncsnpp" if str(v).startswith(NAME) else v),
    "model.channels": Row("model.base_channels"),
    "model.down_blocks": Row(
        "model.channel_multipliers",
        "the paper's, a level a block",
        lambda v: [1, 2, 2, 2, 2, 2][:v],
    ),
    "model.up_blocks": Row(why="as many as down_blocks"),
    "model.res_blocks": Row("model.num_res_blocks"),
    "model.time_embedding_conv2d": Row(why=_ALWAYS),
    "model.output_crop_last_frames": Row(why=_ALWAYS),
    "diffusion_buffer.buffer_lengths": Row(why="diffbuf sweep --vary buffer_size --values"),
    "sde.reverse_start": Row(why="a frame enters the buffer at diffusion_buffer.t_max"),
    "training.num_steps": Row("training.num_steps", "an epoch's there, the whole run's here"),
    "training.gradient_accumulation_steps": Row("training.accumulation_steps"),
    "training.grad_clip": Row("training.grad_clip", "0 is no limit", lambda v: v or None),
    "training.q": Row(why=_OUTLIERS),
    "training.coarse_loss_clip": Row(why=_OUTLIERS),
    "training.other_fix": Row(why=_PAIRS),
    "training.instruments": Row(why=_PAIRS),
    "training.target_instrument": Row(why=_PAIRS),
    "training.early_stop.enabled": Row(why="early_stopping null is never"),
    "training.early_stop.patience": Row("training.early_stopping"),
    "training.early_stop.metric": Row(
        "training.metric_for_scheduler", "", lambda v: str(v).replace("-", "_")
    ),
    "inference.batch_size": Row(why="enhancement is a stream: no batches of chunks"),
    "inference.num_overlap": Row(why="enhancement is a stream: no overlapping chunks"),
}
NAME = "diffusion_buffer"  # how model.name begins there
_MARKS = ("training.instruments", "training.target_instrument", "inference.num_overlap")
_DEPTH = 3  # sections within sections, there and here


def is_foreign(tree: Mapping[str, Any]) -> bool:
    """Whether nested dictionaries have the other project's layout rather than ours."""

    def find(path: str) -> Any:
        section = tree.get(path.partition(".")[0])
        return section.get(path.partition(".")[2]) if isinstance(section, Mapping) else None

    return str(find("model.name")).startswith(NAME) or any(find(m) is not None for m in _MARKS)


@dataclass
class Translation:
    """A config of theirs as one of ours.

    Attributes:
        tree: nested dictionaries for `build_config`.
        same: keys that have the same name, value and meaning.
        taken: our key -> (their key and value, what is different).
        ignored: key -> why it has no meaning here.
        unknown: keys, and their values, that nobody here has heard of.
        looks: what deserves a look.
    """

    tree: dict[str, Any]
    same: list[str]
    taken: dict[str, tuple[str, str]]
    ignored: dict[str, str]
    unknown: list[str]
    looks: list[str]

    def report(self, source: str) -> str:
        """Return one short table: what was taken as what, what was left out, what to look at."""
        ours = dict(_flatten(self.tree))
        rows = [(theirs, f"{key}: {ours[key]}", why) for key, (theirs, why) in self.taken.items()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [
            f"  {theirs:{widths[0]}}  ->  {here:{widths[1]}}  {why}".rstrip()
            for theirs, here, why in rows
        ]
        for title, keys in (
            (f"{len(self.same)} keys are the same", []),
            ("no meaning here", list(self.ignored)),
            ("unknown, left out", self.unknown),
        ):
            if keys or title[0].isdigit():
                lines.append(f"  {title}{': ' if keys else ''}{', '.join(keys)}")
        lines += [f"  look at {look}" for look in self.looks]
        lines.append("  a file of its own: diffbuf config import THEIRS.yaml -o OURS.yaml")
        return "\n".join([f"{source} is a config of Music-Source-Separation-Training:", *lines])

    def to_yaml(self, source: str) -> str:
        """Return our config as YAML, with a comment where something has changed."""
        head = [f"From {source}, a config of Music-Source-Separation-Training."]
        head += [f"Look at {look}" for look in self.looks]
        head += [f"No meaning here: {key} ({why})" for key, why in self.ignored.items()]
        head += [f"Unknown, left out: {key}" for key in self.unknown]
        lines = [f"# {line}" for line in head]
        for section, content in self.tree.items():
            lines += ["", *_yaml_lines(section, content, self.taken, "", "")]
        return "\n".join([*lines, ""])


def translate(tree: Mapping[str, Any], known: set[str]) -> Translation:
    """Make a config of ours of one of theirs; `known` are all our keys' paths.

    Values are not checked: `build_config` does that, by our names.
    """
    found = Translation({}, [], {}, {}, [], [])
    theirs = dict(_flatten(tree))
    both = ("model.channels", "model.base_channels")
    if set(both) <= theirs.keys():
        found.looks.append(
            "{0} {2} against {1} {3}: {0} is taken (the paper's network has 96)".format(
                *both, *map(theirs.get, both)
            )
        )
        found.ignored[both[1]] = f"{both[0]} is taken"
        del theirs[both[1]]
    for key, value in theirs.items():
        row = TABLE.get(key)
        if row is not None and key != row.ours and row.ours in theirs:
            row = Row(why=f"{row.ours}: {_shown(theirs[row.ours])} is taken")
        if row is None and key not in known:
            found.unknown.append(f"{key}: {_shown(value)}")
        elif row is None:
            found.same.append(key)
            put(found.tree, key, value)
        elif not row.ours:
            found.ignored[key] = row.why
        else:
            put(found.tree, row.ours, _made(row, value))
            found.taken[row.ours] = (f"{key}: {_shown(value)}", row.why)
    _settle(found, theirs)
    return found


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key path, value) of nested dictionaries, which may hold themselves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and prefix.count(".") < _DEPTH:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settle(found: Translation, theirs: dict[str, Any]) -> None:
    """Decide what depends on more than one key, and note what deserves a look."""
    training, get = found.tree.setdefault("training", {}), theirs.get
    epochs, steps = get("training.num_epochs"), get("training.num_steps")
    if isinstance(epochs, int) and isinstance(steps, int):
        training["num_steps"] = epochs * steps
    if get("training.early_stop.enabled") is False:
        training["early_stopping"] = None
    metric = training.get("metric_for_scheduler")
    if metric and metric != "loss" and "metrics" not in training:
        training["metrics"] = [metric]
    if (c := get("sde.diffusion.c")) is not None:
        found.looks.append(
            f"sde.diffusion.c {c}: the paper prints 0.08, but its authors' code runs theta 0.08, "
            "c = sqrt(0.08) = 0.283, 3.5 times the noise. For that one: "
            "sde.diffusion.c=null sde.diffusion.theta=0.08"
        )
    for key, other, what in (
        ("model.up_blocks", get("model.down_blocks"), "model.down_blocks"),
        ("sde.reverse_start", get("diffusion_buffer.t_max"), "diffusion_buffer.t_max"),
        ("training.target_instrument", "vocals", "the target of every layout"),
    ):
        if key in theirs and theirs[key] != other:
            found.looks.append(f"{key} {theirs[key]}: {what}, {other}, is taken")
    if found.unknown:
        found.looks.append("the unknown keys: `diffbuf config` lists those there are")


def _made(row: Row, value: Any) -> Any:
    try:
        return row.make(value) if row.make else value
    except (TypeError, ValueError, OverflowError, MemoryError):
        return value  # to be refused by name


def _shown(value: Any) -> str:
    return reprlib.repr(value) if isinstance(value, dict | list) else str(value)[:80]


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a key path of nested dictionaries."""
    *sections, name = path.split(".")
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):
            tree[section] = inner = {}
        tree = inner
    tree[name] = value


def _yaml_lines(
    key: str, value: Any, taken: Mapping[str, tuple[str, str]], prefix: str, indent: str
) -> Iterator[str]:
    path = f"{prefix}{key}"
    if isinstance(value, dict) and value:
        yield f"{indent}{key}:"
        for name, inner in value.items():
            yield from _yaml_lines(name, inner, taken, f"{path}.", f"{indent}  ")
        return
    text = yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]
    theirs, why = taken.get(path, ("", ""))
    comment = f"  # {theirs}{'; ' if why else ''}{why}" if theirs else ""
    yield f"{indent}{key}: {text}{comment}"
