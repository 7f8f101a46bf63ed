"""Configs of Music-Source-Separation-Training, with which many train the Diffusion Buffer.

`load_config` accepts such a file unchanged; `TABLE` says what becomes of each of its keys. A key
that neither project knows is reported and left out, never guessed.
"""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any, NamedTuple


class Row(NamedTuple):
    """What becomes of one key of theirs."""

    ours: str = ""  # our key, which gets the same value unless there is a `make`
    why: str = ""  # what is different; without `ours`, why the key has no meaning here
    make: Callable[[Any], Any] | None = None


_PAIRS = "a clip is a pair of files, mixture and vocals"
_OUTLIERS = "outlier clips are not left out of the loss"
_ALWAYS = "always the case here"

TABLE: dict[str, Row] = {
    "audio.n_fft": Row("audio.stft.n_fft"),
    "audio.hop_length": Row("audio.stft.hop_length"),
    "audio.num_channels": Row(why="channels are averaged to one"),
    "audio.min_mean_abs": Row(why="quiet clips are not drawn again"),
    "audio.stft.window": Row("audio.stft.window", "", lambda v: str(v).removesuffix("_periodic")),
    "model.name": Row("model.name", "", lambda v: "ncsnpp" if str(v).startswith(NAME) else v),
    "model.channels": Row("model.base_channels"),
    "model.down_blocks": Row(
        "model.channel_multipliers",
        "the paper's values for this many levels",
        lambda v: [1, 2, 2, 2, 2, 2][:v] if isinstance(v, int) else v,
    ),
    "model.up_blocks": Row(why="as many as down_blocks"),
    "model.res_blocks": Row("model.num_res_blocks"),
    "model.time_embedding_conv2d": Row(why=_ALWAYS),
    "model.output_crop_last_frames": Row(why=_ALWAYS),
    "diffusion_buffer.buffer_lengths": Row(why="diffbuf sweep --vary buffer_size --values"),
    "sde.reverse_start": Row(why="a frame enters the buffer at diffusion_buffer.t_max"),
    "training.gradient_accumulation_steps": Row("training.accumulation_steps"),
    "training.grad_clip": Row("training.grad_clip", "0 is no limit", lambda v: v or None),
    "training.q": Row(why=_OUTLIERS),
    "training.coarse_loss_clip": Row(why=_OUTLIERS),
    "training.other_fix": Row(why=_PAIRS),
    "training.instruments": Row(why=_PAIRS),
    "training.target_instrument": Row(why=_PAIRS),
    "training.early_stop.enabled": Row(why="early_stopping null turns it off"),
    "training.early_stop.patience": Row("training.early_stopping"),
    "training.early_stop.metric": Row(
        "training.metric_for_scheduler", "", lambda v: str(v).replace("-", "_")
    ),
    "inference.batch_size": Row(why="enhancement is a stream: no batches of chunks"),
    "inference.num_overlap": Row(why="enhancement is a stream: no overlapping chunks"),
}
_UNKNOWN = "unknown here; `diffbuf config` lists all keys"
NAME = "diffusion_buffer"  # how model.name begins there
_MARKS = ("training.instruments", "training.target_instrument", "inference.num_overlap")
_DEPTH = 3  # nesting of sections, there and here


def is_foreign(tree: Mapping[str, Any]) -> bool:
    """Whether nested dictionaries have the other project's layout rather than ours."""
    find = dict(flatten(tree)).get
    return str(find("model.name")).startswith(NAME) or any(find(m) is not None for m in _MARKS)


def translate(tree: Mapping[str, Any], known: set[str]) -> tuple[dict[str, Any], str]:
    """Translate a config of theirs to one of ours; `known` are the paths of all our keys.

    Returns nested dictionaries, not checked yet, and a short table of which keys were translated to
    which, which were left out, and which the user should look at.
    """
    theirs, ours = dict(flatten(tree)), dict[str, Any]()  # by path
    looks = list(_settle(theirs, ours))
    taken: list[tuple[str, str, str]] = []  # their key, our key, what is different
    left = defaultdict(list)  # why a key is left out -> keys
    same = 0
    for key, value in theirs.items():
        row = TABLE.get(key, Row(key) if key in known else Row(why=_UNKNOWN))
        if key != row.ours and row.ours in theirs:
            row = Row(why=f"{row.ours} is used instead")
        if not row.ours:
            left[row.why].append(f"{key}: {_shown(value)}")
            continue
        value = row.make(value) if row.make else value
        ours[row.ours] = value
        if key == row.ours and value == theirs[key]:
            same += 1
        else:
            here = f"{row.ours}: {_shown(value)}"
            taken.append((f"{key}: {_shown(theirs[key])}", here, row.why))
    widths = [max((len(row[i]) for row in taken), default=0) for i in range(2)]
    lines = [f"{a:{widths[0]}}  ->  {b:{widths[1]}}  {why}".rstrip() for a, b, why in taken]
    lines.append(f"{same} keys are the same")
    lines += [f"left out ({why}): {', '.join(keys)}" for why, keys in left.items()]
    nested = reduce(lambda made, item: put(made, *item), ours.items(), dict[str, Any]())
    return nested, "\n".join([*lines, *(f"look at {look}" for look in looks)])


def _settle(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    """Settle keys that depend on each other, in both dictionaries; yield what to look at."""
    get, early = theirs.get, "training.early_stop"
    if get(f"{early}.enabled") is False:
        theirs.pop(f"{early}.patience", None)
    metric = TABLE[f"{early}.metric"].make
    if f"{early}.metric" in theirs and "training.metrics" not in theirs and metric:
        ours["training.metrics"] = [metric(get(f"{early}.metric"))]
    epochs, steps = get("training.num_epochs"), get("training.num_steps")
    if isinstance(epochs, int) and isinstance(steps, int):
        yield f"training.num_steps {steps}: per epoch there, {steps} * {epochs} for a run here"
        theirs["training.num_steps"] = steps * epochs
    if (c := get("sde.diffusion.c")) is not None:
        yield (
            f"sde.diffusion.c {c}: the paper prints 0.08, but its authors' code runs theta 0.08, "
            "c = sqrt(0.08) = 0.283, 3.5 times the noise. To use theirs: "
            "sde.diffusion.c=null sde.diffusion.theta=0.08"
        )
    if "model.channels" in theirs and (base := theirs.pop("model.base_channels", None)):
        yield (
            f"model.base_channels {base} contradicts channels {get('model.channels')}: channels is "
            "used (the paper's network has 96)"
        )
    for key, other, what in (
        ("model.up_blocks", get("model.down_blocks"), "model.down_blocks"),
        ("sde.reverse_start", get("diffusion_buffer.t_max"), "diffusion_buffer.t_max"),
        ("training.target_instrument", "vocals", "the target of every layout"),
    ):
        if key in theirs and theirs[key] != other:
            yield f"{key} {_shown(theirs[key])}: {what}, {other}, is used"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key path, value) of nested dictionaries, which may contain themselves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and prefix.count(".") < _DEPTH:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    return reprlib.repr(value) if isinstance(value, dict | list) else str(value)[:80]


def put(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of nested dictionaries with a key path set to a value."""
    key, dot, rest = path.partition(".")
    if dot:
        inner = tree.get(key)
        value = put(inner if isinstance(inner, dict) else {}, rest, value)
    return {**tree, key: value}
