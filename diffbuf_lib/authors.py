"""Checkpoints of the method's authors (github.com/sp-uhh/Diffusion-Buffer) as folders of ours.

Facts of their files: Lightning's `state_dict`; `hyper_parameters`, the values of their command
line, among which are classes of their package; `ema`, torch_ema's state, whose `shadow_params` are
the averaged weights in the order of the parameters. Nothing in a file is ever executed.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffbuf_lib.config import build_config
from diffbuf_lib.errors import CheckpointError, ConfigError
from diffbuf_lib.foreign import put
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training.folder import apply_weights, load_tensors, plain_names


class Imported(NamedTuple):
    """A model, and in words which of the weights it has and what was left out."""

    model: DiffusionBufferModel
    notes: list[str]


def import_checkpoint(path: str | Path, *, raw: bool = False) -> Imported:
    """Read a Lightning checkpoint of the authors' branches interspeech_submission or main.

    Args:
        path: the .ckpt file.
        raw: the weights as training left them, instead of the averaged ones.

    Raises:
        CheckpointError: no such file, a damaged one, not one of theirs, a network or option that
            is not here, or tensors that do not fit.
    """
    path, unknown = Path(path), set[str]()
    content = load_tensors(path, "checkpoint", pickle_module=_inert_pickle(unknown))
    hyper = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(hyper, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(
            f"{path} is no Lightning checkpoint: it lacks state_dict or hyper_parameters; weights "
            "alone start a run with --start_check_point"
        )
    notes: list[str] = []
    try:
        cfg = build_config(_config_tree(hyper, notes), source=str(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    weights = _weights(content, raw, path, notes)
    model = DiffusionBufferModel(cfg)
    names = {"ncsnpp": _ncsnpp_names, "bc_ncsnpp": _bc_ncsnpp_names}[cfg.model.name](model.network)
    apply_weights(model, _renamed(weights, names, model.network, path), path)
    if unknown:
        notes.append(f"not read, since they are objects: {', '.join(sorted(unknown))}")
    rest = sorted(content.keys() - {"state_dict", "hyper_parameters", "ema"})
    notes.append(f"left out: {', '.join(map(str, rest))}")
    return Imported(model.eval(), notes)


# Reading without executing.

_SAFE = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _Inert:
    """Takes the place of any object of a class that is not in `_SAFE`, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Take what a pickled list holds."""

    extend = append


def _inert_pickle(unknown: set[str]) -> Any:
    """Return what `torch.load` takes for the pickle module; names of other classes are noted."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _SAFE:
                return _SAFE[module, name]
            if name == "AttributeDict":  # Lightning's, a dict
                return dict
            unknown.add(f"{module}.{name}")
            return type("Inert", (_Inert,), {})

    return SimpleNamespace(__name__="inert", Unpickler=Unpickler)


# Their command line's values as a config of ours.

_TAKEN = {
    "lr": "training.lr",
    "ema_decay": "training.ema_momentum",
    "batch_size": "training.batch_size",
    "t_eps": "diffusion_buffer.t_eps",
    "num_frames": "diffusion_buffer.num_frames",
    "n_fft": "audio.stft.n_fft",
    "hop_length": "audio.stft.hop_length",
    "fs": "audio.sample_rate",
    "spec_factor": "preprocessing.magnitude_compression.beta",
    "spec_abs_exponent": "preprocessing.magnitude_compression.alpha",
    "dropout": "model.dropout",
}
_LOSSES = {
    "mse": "weighted_score",
    "onestep": "data_prediction",
    "data_pred_loss": "data_prediction",
}
_MUST_BE = {  # options of theirs that nothing here does
    "transform_type": "exponent",
    "discriminative": False,
    "abs_pe": False,
    "bwr": False,
    "causal": True,
    "fir": True,
    "dilation_freq": 1,
    "num_resnet_blocks": 1,
    "time_emb_reduction": "conv",
    "activation": "silu",
}


def _config_tree(hyper: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Make our nested dictionaries of theirs flat ones; what deserves a look goes to `notes`."""
    backbone, get = hyper.get("backbone"), hyper.get
    if "diff_buffer_range" not in hyper or backbone not in ("ncsnpp", "bc_ncsnpp"):
        raise ConfigError(
            f"backbone {backbone!r:.40} with SDE {get('sde')!r:.40} is not the Diffusion Buffer's "
            "(ncsnpp or bc_ncsnpp with a diffusion time for every frame): networks of sgmse, such "
            "as ncsnpp_v2, know one time for the whole utterance, so they lack the layers "
            "(Conv_time) that a buffer needs, and cannot be had here"
        )
    for key, value in _MUST_BE.items():
        if get(key, value) != value:
            raise ConfigError(f"{key} {get(key)!r:.40} of {backbone} is not here, only {value!r}")
    tree: dict[str, Any] = {}
    for theirs, ours in _TAKEN.items():
        if theirs in hyper:
            put(tree, ours, hyper[theirs])
    model, buffer = tree.setdefault("model", {}), tree.setdefault("diffusion_buffer", {})
    inner = "time_inside" if backbone == "ncsnpp" else "time"
    model |= {"name": backbone, **_widths(hyper)}
    model["output_scale"] = _one_of(hyper, "output_scale", {"time": inner, "no": "none"})
    # Their scale is a view of their times, in which they set history frames to 1: so the network
    # was trained and is evaluated with history at t = 1.
    model["history_time"] = float(get("output_scale") == "time")
    stft = tree.setdefault("audio", {}).setdefault("stft", {})
    stft["win_length"] = stft.get("n_fft")
    stft["window"] = _one_of(hyper, "window", {"hann": "hann", "sqrthann": "sqrt_hann"})
    tree["audio"]["chunk_size"] = (_int(hyper, "num_frames") - 1) * _int(hyper, "hop_length")
    tree["sde"] = _sde(hyper)
    tree.setdefault("training", {})["loss"] = _one_of(hyper, "loss_type", _LOSSES)

    low, high = hyper["diff_buffer_range"]
    buffer["buffer_size"] = low if high - low == 1 else _int(hyper, "diff_buffer_length_inference")
    if high - low != 1:
        notes.append(f"buffer_size drawn from {low} to {high - 1} there; {buffer['buffer_size']}")
    buffer["t_max"] = get("T_sampling", 1.0)
    buffer["time_sampling"] = "linspace" if get("fixed_buffer_steps") else "random"
    if get("sde") == "bbed" and buffer["t_max"] != 1:
        notes.append(
            f"trained with the mean at t / {buffer['t_max']}, which contradicts the drift; here, "
            "as in their evaluation, it is at t"
        )
    for key, value in (("normalize", "not"), ("remove_bins", 0)):
        if get(key, value) != value:
            notes.append(f"{key} {get(key)}: not done here, so levels differ from their training")
    return tree


def _widths(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `model` that say how wide and deep it is."""
    if hyper["backbone"] == "ncsnpp":
        multipliers = list(hyper.get("ch_mult", ()))
        if not 1 <= len(multipliers) <= 4:
            raise ConfigError(
                f"ch_mult {multipliers} has {len(multipliers)} levels, and from the fifth on their "
                "network has attention that is not here: at most 4"
            )
        base, blocks = _int(hyper, "nf"), _int(hyper, "num_res_blocks")
    else:
        channels, strides = list(hyper.get("channels", ())), list(hyper.get("strides", ()))
        odd = [c for c in channels if c % channels[0] or c % 32]
        if odd or not channels or strides != [2] * (len(channels) - 1):
            raise ConfigError(
                f"channels {channels} with strides {strides} are not here: multiples of 32 and of "
                "the first, and strides of 2"
            )
        base, blocks = channels[0], 1
        multipliers = [c // base for c in channels]
    return {"base_channels": base, "channel_multipliers": multipliers, "num_res_blocks": blocks}


def _sde(hyper: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "bbed": {"theta": "theta", "k": "k"},
        "ouve": {"theta": "gamma", "sigma_min": "sigma_min", "sigma_max": "sigma_max"},
    }
    found = _one_of(hyper, "sde", names)
    options = {ours: hyper[theirs] for theirs, ours in found.items() if theirs in hyper}
    return {"type": hyper["sde"], "diffusion": options}


def _one_of(hyper: Mapping[str, Any], key: str, choices: Mapping[str, Any]) -> Any:
    value = hyper.get(key)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key} {value!r:.40} is not here: {' or '.join(choices)}")
    return choices[value]


def _int(hyper: Mapping[str, Any], key: str) -> int:
    value = hyper.get(key)
    if not isinstance(value, int):
        raise ConfigError(f"hyper_parameters has {key} {value!r:.40}, not a whole number")
    return value


# Their tensors under our names.


def _weights(
    content: Mapping[str, Any], raw: bool, path: Path, notes: list[str]
) -> dict[str, Tensor]:
    """Return the network's weights by their names: averaged ones, or those beside them."""
    state = {n: t for n, t in content["state_dict"].items() if isinstance(t, Tensor)}
    state = {n: t for n, t in state.items() if "dnn." in n} or state  # beside it: a loss's windows
    state = plain_names(state)
    ema = content.get("ema")
    ema = ema if isinstance(ema, dict) else {}
    # Saved at a validation, `state_dict` holds the averaged weights too, and these the others.
    chosen = ema.get("collected_params" if raw else "shadow_params")
    if not chosen:
        if not raw:
            notes.append("no averaged weights in the file: those of state_dict are taken")
        return state
    names = [n for n in state if n.rpartition(".")[2] not in ("counts", "inv_div")]
    if len(chosen) != len(names):  # some versions of torch_ema keep only what is trained
        names = [n for n in names if n.rpartition(".")[2] != "W"]
    wrong = [n for n, t in zip(names, chosen, strict=False) if t.shape != state[n].shape]
    if len(chosen) != len(names) or wrong:
        raise CheckpointError(
            f"{path}: its {len(chosen)} averaged weights are not those of its {len(names)} "
            f"parameters{f', first at {wrong[0]}' if wrong else ''}; --raw takes the others"
        )
    notes.append(f"weights: {'as training left them' if raw else 'averaged'}")
    return {**state, **dict(zip(names, chosen, strict=True))}


_BLOCK = {
    "GroupNorm_0": "norm_in",
    "Conv_0": "conv_in",
    "Conv_time": "time",
    "GroupNorm_1": "norm_out",
    "Conv_1": "conv_out",
    "Conv_2": "shortcut",
}
_LEAVES = {"gain": "weight", "W": "frequencies"}


def _renamed(
    weights: Mapping[str, Tensor], names: Mapping[str, str], network: nn.Module, path: Path
) -> dict[str, Tensor]:
    """Give the tensors of their modules, `names`, the names and shapes of ours."""
    ours, found, strange = network.state_dict(), dict[str, Tensor](), list[str]()
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("counts", "inv_div"):  # buffers of constants
            continue
        if ".NIN_" in name:  # a 1x1 convolution, [in, out]; the first three are one of ours
            joined.setdefault(name[:-3], {})[name[-3:]] = tensor.T if leaf == "W" else tensor
            continue
        target = f"{names.get(module, '?')}.{_LEAVES.get(leaf, leaf)}"
        if target not in ours:
            strange.append(name)
        elif tensor.numel() == ours[target].numel():
            tensor = tensor.reshape(ours[target].shape)  # a norm's [1, C, 1, 1]
        found[target] = tensor
    for prefix, parts in joined.items():
        attention = names.get(prefix.rpartition(".")[0], "?")
        for leaf, short in (("weight", "W"), ("bias", "b")):
            qkv = [parts.get(f"{i}.{short}", torch.empty(0)) for i in range(4)]
            found[f"{attention}.qkv.{leaf}"] = torch.cat(qkv[:3])
            found[f"{attention}.out.{leaf}"] = qkv[3]
            for target in (f"{attention}.qkv.{leaf}", f"{attention}.out.{leaf}"):
                if target in ours and found[target].numel() == ours[target].numel():
                    found[target] = found[target].reshape(ours[target].shape)
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} tensors have no place in a network of its hyper_parameters, "
            f"first {strange[0]}"
        )
    return found


def _ncsnpp_names(network: Any) -> dict[str, str]:
    """Return, for their modules in a numbered list, ours: both run in the same order."""
    order = ["embed_time", "embed_time.hidden", "embed_time.out", "first"]
    for i, down in enumerate(network.down):
        order += [f"down.{i}.blocks.{j}" for j in range(len(down.blocks))]
        order += [f"down.{i}.{name}" for name in ("shrink", "add_input") if down.shrink]
    order += ["middle_in", "attention", "middle_out"]
    for i, up in enumerate(network.up):
        order += [f"up.{i}.blocks.{j}" for j in range(len(up.blocks))]
        order += [f"up.{i}.norm_out", f"up.{i}.conv_out"]
        order += [f"up.{i}.grow"] if up.grow else []
    names = {"output_layer": "last"}
    for number, ours in enumerate(order):
        theirs = f"all_modules.{number}"
        names[theirs] = ours
        if ours.endswith("add_input"):
            names[f"{theirs}.Conv_0"] = ours
        elif ours == "attention":
            names[f"{theirs}.GroupNorm_0"] = f"{ours}.norm"
        else:
            names |= {f"{theirs}.{part}": f"{ours}.{name}" for part, name in _BLOCK.items()}
    return names


def _bc_ncsnpp_names(network: Any) -> dict[str, str]:
    """Return, for their modules, ours."""
    names = {
        "temp_enc": "embed_time",
        "temp_enc.lin_layer1.lin_layer": "embed_time.hidden",
        "temp_enc.lin_layer2.lin_layer": "embed_time.out",
        "in_layer": "first",
        "out_layers.0": "norm_out",
        "out_layers.2": "conv_out",
        "out_layers.3": "last",
    }
    for theirs, ours in (("down", "down"), ("bottleneck", "middle"), ("up", "up")):
        for i in range(len(getattr(network, ours))):
            block = f"{theirs}_layers.{i}"
            names |= {f"{block}.{part}": f"{ours}.{i}.{name}" for part, name in _BLOCK.items()}
    return names
