"""Checkpoints of the method's authors: made here in their file's form, read without running them.

That the networks give what their code gives can only be seen beside their code: see CHANGELOG.
"""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib import DiffusionBufferModel
from diffbuf_lib.authors import import_checkpoint
from tests.conftest import call, refused
from tests.training.helpers import fit

HYPER = {
    "backbone": "ncsnpp", "nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "sde": "bbed",
    "theta": 0.08, "k": 2.6, "T_sampling": 0.8, "t_eps": 0.03, "lr": 1e-4, "ema_decay": 0.999,
    "loss_type": "mse", "output_scale": "time", "diff_buffer_range": [3, 4],
    "diff_buffer_length_inference": 2, "fixed_buffer_steps": False, "n_fft": 62, "hop_length": 31,
    "num_frames": 16, "window": "hann", "spec_factor": 0.15, "spec_abs_exponent": 0.5,
    "transform_type": "exponent", "normalize": "not", "batch_size": 2, "fs": 16000,
    "gains": [0, 0], "base_dir": "/nowhere",
}  # fmt: skip
JOURNAL = {
    "backbone": "bc_ncsnpp", "channels": [32, 32, 64], "strides": [2, 2], "loss_type": "onestep",
    "fixed_buffer_steps": "rdm", "causal": True, "fir": True, "activation": "silu",
}  # fmt: skip


def layer(name, weight, bias=None, leaf="weight"):
    """Return names and shapes of a layer, whose bias is as long as the weight's first axis."""
    return {f"{name}.{leaf}": weight, f"{name}.bias": bias or weight[:1]}


def block(name, cin, cout, width, kernel, *, gain="weight", resampled=False):
    """Return names and shapes of a residual block, in their order."""

    def norm(number, channels):
        shape = (1, channels, 1, 1) if gain == "gain" else (channels,)
        return layer(f"{name}.GroupNorm_{number}", shape, shape, gain)

    def conv(number, a, b, k):
        shape = (a, b, k, k) if name.startswith("up_layers") else (b, a, k, k)
        return layer(f"{name}.Conv_{number}", shape, (b,))

    shapes = norm(0, cin) | conv(0, cin, cout, 3) | layer(f"{name}.Conv_time", (cout, width, 3))
    shapes |= norm(1, cout) | conv(1, cout, cout, 3)
    return shapes | (conv(2, cin, cout, kernel) if resampled or cin != cout else {})


def ncsnpp_shapes():
    """Two levels of 8 and 16 channels, modules numbered in the order in which they are made."""
    blocks = {4: (8, 8), 5: (8, 8), 7: (8, 16), 8: (16, 16), 10: (16, 16), 11: (32, 16)}
    blocks |= {12: (24, 16), 15: (16, 16), 16: (24, 8), 17: (16, 8)}
    layers = {1: (32, 16), 2: (32, 32), 3: (8, 4, 3, 3), 13: (16,), 14: (4, 16, 3, 3)}
    layers |= {18: (8,), 19: (4, 8, 3, 3)}
    shapes = layer("output_layer", (2, 4, 1, 1))
    for number in range(20):
        name = f"all_modules.{number}"
        if number in blocks:
            shapes |= block(name, *blocks[number], 32, 1, resampled=number in (5, 15))
        elif number in layers:
            shapes |= layer(name, layers[number])
    shapes |= {"all_modules.0.W": (8,)} | layer("all_modules.6.Conv_0", (8, 4, 1, 1))
    shapes |= layer("all_modules.9.GroupNorm_0", (16,))
    for i in range(4):
        shapes |= {f"all_modules.9.NIN_{i}.W": (16, 16), f"all_modules.9.NIN_{i}.b": (16,)}
    return shapes


def bc_ncsnpp_shapes():
    """Three levels of 32, 32 and 64 channels."""
    shapes = {"temp_enc.W": (128,)} | layer("in_layer", (32, 4, 3, 3))
    shapes |= layer("temp_enc.lin_layer1.lin_layer", (512, 256))
    shapes |= layer("temp_enc.lin_layer2.lin_layer", (512, 512))
    for name, cin, cout in (
        *(("down_layers.0", 32, 32), ("down_layers.1", 32, 64), ("bottleneck_layers.0", 64, 64)),
        *(("bottleneck_layers.1", 64, 64), ("up_layers.0", 128, 32), ("up_layers.1", 64, 32)),
    ):
        shapes |= block(name, cin, cout, 512, 3, gain="gain", resampled=True)
    shapes |= layer("out_layers.0", (1, 32, 1, 1), (1, 32, 1, 1), "gain")
    return shapes | layer("out_layers.2", (4, 32, 3, 3)) | layer("out_layers.3", (2, 4, 1, 1))


def make(path, prefix="dnn.", hyper=(), frozen=True, **changes):
    """Write a checkpoint in their form; return its content."""
    hyper = {**HYPER, **dict(hyper)}
    shapes = ncsnpp_shapes() if hyper["backbone"] == "ncsnpp" else bc_ncsnpp_shapes()
    generator = torch.Generator().manual_seed(0)
    weights = {n: 0.2 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    state = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    if hyper["backbone"] == "bc_ncsnpp":
        state[f"{prefix}out_layers.0.counts"] = torch.ones(1, 1, 4)
    state["mrstftloss.window"] = torch.ones(3)
    shadow = [t + 1 for n, t in weights.items() if frozen or n != "all_modules.0.W"]
    content = {
        "state_dict": state, "epoch": 7, "callbacks": {"best": np.float64(1.0)},
        "hyper_parameters": {**hyper, "data_module_cls": pickle.PickleBuffer},
        "ema": {"decay": 0.999, "shadow_params": shadow, "collected_params": None},
        **changes,
    }  # fmt: skip
    torch.save(content, path)
    return SimpleNamespace(weights=weights, content=content)


@pytest.mark.parametrize("prefix", ["dnn.", "dnn._orig_mod.", "module.dnn.", "dnn.module."])
@pytest.mark.parametrize("hyper", [{}, JOURNAL], ids=["interspeech", "journal"])
def test_every_tensor_finds_its_place(tmp_path, hyper, prefix):
    made = make(tmp_path / "c.ckpt", prefix, hyper)
    model, notes = import_checkpoint(tmp_path / "c.ckpt")
    ours = model.network.state_dict()
    last, time = (
        ("output_layer", "all_modules.0.W") if not hyper else ("out_layers.3", "temp_enc.W")
    )
    assert torch.equal(ours["last.weight"], made.weights[f"{last}.weight"] + 1)
    assert torch.equal(ours["embed_time.frequencies"], made.weights[time] + 1)
    total = sum(tensor.sum() + tensor.numel() for tensor in made.weights.values())
    torch.testing.assert_close(sum(t.sum() for t in model.state_dict().values()), total)
    assert "PickleBuffer" in " ".join(notes)
    cfg = model.cfg
    assert cfg.model.name == ("bc_ncsnpp" if hyper else "ncsnpp")
    assert cfg.training.loss == ("data_prediction" if hyper else "weighted_score")
    assert cfg.diffusion_buffer.time_sampling == ("linspace" if hyper else "random")
    assert cfg.model.history_time == 1
    assert (cfg.diffusion_buffer.buffer_size, cfg.num_frames, cfg.audio.num_frames) == (3, 16, 16)


def test_averaged_and_raw_weights(tmp_path):
    made = make(tmp_path / "c.ckpt", frozen=False)  # torch_ema without what needs no gradient
    first = made.weights["output_layer.bias"]
    averaged, raw = (import_checkpoint(tmp_path / "c.ckpt", raw=raw)[0] for raw in (False, True))
    assert torch.equal(averaged.network.last.bias, first + 1)
    assert torch.equal(averaged.network.embed_time.frequencies, made.weights["all_modules.0.W"])
    assert torch.equal(raw.network.last.bias, first)
    # Saved at a validation: the averaged weights are in the model, the others beside them.
    collected = [tensor + 2 for tensor in made.weights.values()]
    make(tmp_path / "c.ckpt", ema={**made.content["ema"], "collected_params": collected})
    raw, _ = import_checkpoint(tmp_path / "c.ckpt", raw=True)
    assert torch.equal(raw.network.last.bias, first + 2)


def test_time_divides_before_the_bias_of_ncsnpp(tmp_path):
    make(tmp_path / "c.ckpt")
    model, _ = import_checkpoint(tmp_path / "c.ckpt")
    V, Y = torch.randn(2, 1, 32, 16, dtype=torch.complex64)
    t = torch.tensor([[0.1, 0.4, 0.8]])
    bias = torch.complex(*model.network.last.bias.detach())
    with torch.no_grad():
        inside = model.denoise(V, Y, t)[0] - bias
        model.network.divide_by_time = False
        plain = model.denoise(V, Y, t)[0] - bias
    torch.testing.assert_close(inside * t[:, None], plain)


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "harm"

    class Harm:
        def __reduce__(self):
            return Path.touch, (target,)

    make(tmp_path / "c.ckpt", hyper={"extra": Harm(), "more": [pickle.PickleBuffer, copy.copy]})
    _, notes = import_checkpoint(tmp_path / "c.ckpt")
    assert not target.exists()
    assert "pathlib" in " ".join(notes)
    torch.load(tmp_path / "c.ckpt", weights_only=False)
    assert target.exists(), "the test's file must be able to do harm"


@pytest.mark.parametrize(
    ("hyper", "part"),
    [
        ({"backbone": "ncsnpp_v2", "sde": "ouve"}, "sgmse"),
        ({"ch_mult": [1, 2, 2, 2, 2]}, "attention"),
        ({"ch_mult": [1, 1]}, "tensors"),
        ({"nf": 16}, "shape"),
        ({"nf": "wide"}, "base_channels"),
        ({"diff_buffer_range": 30}, "int"),
        ({"output_scale": "sigma"}, "output_scale"),
        ({"transform_type": "log"}, "transform_type"),
        ({**JOURNAL, "strides": [2, 4]}, "strides"),
    ],
)
def test_what_is_not_here_is_refused_in_one_line(tmp_path, hyper, part):
    make(tmp_path / "c.ckpt", hyper=hyper)
    refused(lambda: import_checkpoint(tmp_path / "c.ckpt"), part)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.ckpt"
    shadow = make(path).content["ema"]["shadow_params"]
    path.write_bytes(path.read_bytes()[:-100])
    refused(lambda: import_checkpoint(path), path)
    torch.save({"state_dict": {}}, path)
    refused(lambda: import_checkpoint(path), "hyper_parameters")
    make(path, ema={"shadow_params": shadow[:-1]})
    refused(lambda: import_checkpoint(path), "--raw")


@pytest.mark.parametrize("hyper", [{}, JOURNAL], ids=["interspeech", "journal"])
def test_an_imported_checkpoint_enhances_and_trains_on(tmp_path, hyper, monkeypatch, capsys):
    path, folder, clean = (tmp_path / name for name in ("c.ckpt", "model", "out.wav"))
    make(path, hyper=hyper)
    soundfile.write(tmp_path / "in.wav", 0.1 * np.sin(np.arange(4000)), 16000)
    for args, status in (
        (("import", path, "-o", folder), 0),
        (("import", path, "-o", folder), 2),  # which is there
        (("enhance", tmp_path / "in.wav", "-o", clean, "--model", folder), 0),
    ):
        assert call(monkeypatch, capsys, *args)[0] == status
    assert soundfile.info(clean).frames == 4000
    cfg = DiffusionBufferModel.from_pretrained(folder).cfg
    cfg = cfg.override("training.use_amp=false", "training.num_workers=0")
    (record,) = fit(cfg, tmp_path / "run", 1, valid_set=None, start_check_point=folder)
    assert np.isfinite(record.loss)
