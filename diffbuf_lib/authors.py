"""Checkpoints of the method's authors (github.com/sp-uhh/Diffusion-Buffer) as our models.

Their files hold Lightning's `state_dict`; `hyper_parameters`, the values of their command line,
which include classes of their package; and `ema`, torch_ema's state, whose `shadow_params` are the
averaged weights in the order of the parameters. Nothing in a file is ever executed.
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
from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import CheckpointError, ConfigError
from diffbuf_lib.foreign import put
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training.folder import apply_weights, load_tensors, plain_names


class Imported(NamedTuple):
    """A model, and notes that say which weights it has and what was left out."""

    model: DiffusionBufferModel
    notes: list[str]


def import_checkpoint(path: str | Path, *, raw: bool = False) -> Imported:
    """Read a Lightning checkpoint of the authors' branches interspeech_submission or main.

    `raw` takes the weights as training left them, instead of the averaged ones. Raises
    CheckpointError for a file that is missing, damaged, not theirs, or has an unsupported option.
    """
    path, unknown = Path(path), set[str]()
    content = load_tensors(path, "checkpoint", pickle_module=_inert_pickle(unknown))
    hyper = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(hyper, dict) or not isinstance(content.get("state_dict"), dict):
        what = "not a Lightning checkpoint: it lacks state_dict or hyper_parameters"
        raise CheckpointError(f"{path} is {what}; weights alone are for --start_check_point")
    notes: list[str] = []
    try:
        model = DiffusionBufferModel(build_config(_config_tree(hyper, notes), source=str(path)))
        weights = _joined(_chosen(content, raw, notes))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {reason(error)[:200]}"
        raise CheckpointError(f"{path} is not as the authors' code writes it: {why}") from error
    name, network = model.cfg.model.name, model.network
    names = (_ncsnpp_names if name == "ncsnpp" else _bc_ncsnpp_names)(network)
    apply_weights(model, _renamed(weights, names, network, path), path)
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
    """Stands in for any object whose class is not in `_SAFE`, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    __init__ = __setstate__ = __setitem__ = append = extend = _nothing  # what unpickling calls


def _inert_pickle(unknown: set[str]) -> Any:
    """Return a stand-in for `torch.load`'s pickle module, which adds other classes to `unknown`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _SAFE:
                return _SAFE[module, name]
            if name == "AttributeDict":  # Lightning's, a dict
                return dict
            unknown.add(f"{module}.{name}")
            return type("Inert", (_Inert,), {})

    return SimpleNamespace(__name__="inert", Unpickler=Unpickler)


# Their command line's values as our config.

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
_DATA = "data_prediction"
_LOSSES = {"mse": "weighted_score", "onestep": _DATA, "data_pred_loss": _DATA}
_SDES = {  # their options, and ours
    "bbed": {"theta": "theta", "k": "k"},
    "ouve": {"theta": "gamma", "sigma_min": "sigma_min", "sigma_max": "sigma_max"},
}
_MUST_BE = {  # other values are not supported here
    **dict.fromkeys(("discriminative", "abs_pe", "bwr"), False),
    **dict.fromkeys(("causal", "fir"), True),
    **dict.fromkeys(("dilation_freq", "num_resnet_blocks"), 1),
    "transform_type": "exponent",
    "time_emb_reduction": "conv",
    "activation": "silu",
}


def _config_tree(hyper: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Turn their flat dictionary into our nested one; add what to look at to `notes`."""
    backbone, get = hyper.get("backbone"), hyper.get
    if "diff_buffer_range" not in hyper or backbone not in ("ncsnpp", "bc_ncsnpp"):
        what = f"backbone {backbone!r:.40} with SDE {get('sde')!r:.40} is not a Diffusion Buffer's"
        why = "networks of sgmse have one diffusion time per utterance, and lack Conv_time"
        raise ConfigError(f"{what} (ncsnpp or bc_ncsnpp): {why}")
    for key, value in _MUST_BE.items():
        if get(key, value) != value:
            raise ConfigError(f"{key} {get(key)!r:.40} of {backbone} does not work, only {value!r}")
    low, high = hyper["diff_buffer_range"]
    size, t_max = low if high - low == 1 else hyper["diff_buffer_length_inference"], 1.0
    if get("sde") == "bbed" and (t_max := hyper["T_sampling"]) != 1:
        notes.append(
            f"trained with the mean at t / {t_max}, which contradicts the drift; here, as in "
            "their evaluation, it is at t"
        )
    if high - low != 1:
        notes.append(f"buffer_size was drawn from {low} to {high - 1}; here it is {size}")
    for key, value in (("normalize", "not"), ("remove_bins", 0)):
        if get(key, value) != value:
            notes.append(f"{key} {get(key)}: not done here, so levels differ from their training")

    options = {ours: hyper[key] for key, ours in _one_of(hyper, "sde", _SDES).items()}
    scales = {"time": "time_inside" if backbone == "ncsnpp" else "time", "no": "none"}
    windows = {"hann": "hann", "sqrthann": "sqrt_hann"}
    keys = {
        "audio.chunk_size": (hyper["num_frames"] - 1) * hyper["hop_length"],
        "audio.stft.win_length": hyper["n_fft"],
        "audio.stft.window": _one_of(hyper, "window", windows),
        "model.name": backbone,
        "model.output_scale": _one_of(hyper, "output_scale", scales),
        # Their scale is a view of their times, in which they set history frames to 1, so the
        # network was trained, and is evaluated, with history at t = 1.
        "model.history_time": float(hyper["output_scale"] == "time"),
        "diffusion_buffer.buffer_size": size,
        "diffusion_buffer.t_max": t_max,
        "diffusion_buffer.time_sampling": "linspace" if get("fixed_buffer_steps") else "random",
        "sde.type": hyper["sde"],
        "sde.diffusion": options,
        "training.loss": _one_of(hyper, "loss_type", _LOSSES),
        **{ours: hyper[theirs] for theirs, ours in _TAKEN.items() if theirs in hyper},
    }
    tree: dict[str, Any] = {"model": _widths(hyper)}
    for path, value in keys.items():
        tree = put(tree, path, value)
    return tree


def _widths(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `model` that set its width and depth."""
    if hyper["backbone"] == "ncsnpp":
        base, multipliers, blocks = hyper["nf"], hyper["ch_mult"], hyper["num_res_blocks"]
        if len(multipliers) > 4:
            raise ConfigError(f"ch_mult {multipliers}: attention at a fifth level is not supported")
    else:
        channels, strides = hyper["channels"], hyper["strides"]
        base, blocks = channels[0], 1
        multipliers = [c // base for c in channels]
        odd = [c for c in channels if c % base or c % 32]
        if odd or strides != [2] * (len(channels) - 1):
            want = "multiples of 32 and of the first, with strides of 2, work"
            raise ConfigError(f"channels {channels}, strides {strides}: only {want}")
    return {"base_channels": base, "channel_multipliers": multipliers, "num_res_blocks": blocks}


def _one_of(hyper: Mapping[str, Any], key: str, choices: Mapping[str, Any]) -> Any:
    value = hyper.get(key)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key} {value!r:.40} is not supported, only {' or '.join(choices)}")
    return choices[value]


# Their tensors under our names.

_CONSTANTS = ("counts", "inv_div")  # of their norms, which are not parameters


def _chosen(content: Mapping[str, Any], raw: bool, notes: list[str]) -> dict[str, Tensor]:
    """Return the network's weights by name: the averaged ones, or with `raw` the others."""
    state = {n: t for n, t in content["state_dict"].items() if isinstance(t, Tensor)}
    state = {n: t for n, t in state.items() if "dnn." in n} or state  # the rest: a loss's windows
    state = plain_names(state)
    # If saved during validation, `state_dict` also holds the averaged weights; `ema` the others.
    chosen = content.get("ema", {}).get("collected_params" if raw else "shadow_params")
    averaged = "as training left them" if raw else "averaged" if chosen else "none is averaged"
    notes.append(f"weights: {averaged}")
    if not chosen:
        return state
    names = [n for n in state if n.rpartition(".")[2] not in _CONSTANTS]
    if len(chosen) != len(names):  # some versions of torch_ema keep only what is trained
        names = [n for n in names if ".NIN_" in n or not n.endswith(".W")]  # no frequencies
    if [t.shape for t in chosen] != [state[n].shape for n in names]:
        counts = f"{len(chosen)} averaged weights do not match its {len(names)} parameters"
        raise ConfigError(f"its {counts}; --raw uses the others")
    return {**state, **dict(zip(names, chosen, strict=True))}


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge attention's NIN_0 to NIN_2, [in, out], into one 1x1 convolution; NIN_3 is another."""
    joined = {name: tensor for name, tensor in weights.items() if ".NIN_" not in name}
    for first in (name for name in weights if name.endswith(".NIN_0.W")):
        prefix = first.removesuffix(".NIN_0.W")
        W, b = ([weights[f"{prefix}.NIN_{i}.{leaf}"] for i in range(4)] for leaf in "Wb")
        joined[f"{prefix}.qkv.weight"] = torch.cat(W[:3], dim=1).T
        joined[f"{prefix}.qkv.bias"] = torch.cat(b[:3])
        joined[f"{prefix}.out.weight"], joined[f"{prefix}.out.bias"] = W[3].T, b[3]
    return joined


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
    """Give their tensors our names and shapes; `names` maps their modules to ours."""
    ours, found, strange = network.state_dict(), dict[str, Tensor](), list[str]()
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        target = f"{names.get(module)}.{_LEAVES.get(leaf, leaf)}"
        if target in ours:
            shape = ours[target].shape  # theirs: norms [1, C, 1, 1]; a 1x1 may lack the ones
            same = tensor.squeeze().shape == ours[target].squeeze().shape
            found[target] = tensor.reshape(shape) if same else tensor
        elif leaf not in _CONSTANTS:
            strange.append(name)
    if strange:
        what = f"{len(strange)} tensors, first {strange[0]}"
        raise CheckpointError(f"{path}: the network of hyper_parameters has no place for {what}")
    return found


def _ncsnpp_names(network: Any) -> dict[str, str]:
    """Map their modules, a numbered list, to ours: both run in the same order."""
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
            for part, name in (("GroupNorm_0", "norm"), ("qkv", "qkv"), ("out", "out")):
                names[f"{theirs}.{part}"] = f"{ours}.{name}"
        else:
            names |= {f"{theirs}.{part}": f"{ours}.{name}" for part, name in _BLOCK.items()}
    return names


def _bc_ncsnpp_names(network: Any) -> dict[str, str]:
    """Map their modules to ours."""
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
