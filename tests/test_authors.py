"""Checkpoints of the method's authors: made here in their file's form, read without running them.

That the networks give what their code gives can only be seen beside their code: see CHANGELOG.
"""

import copy
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib import DiffusionBufferModel, cli
from diffbuf_lib.authors import import_checkpoint
from diffbuf_lib.errors import CheckpointError
from tests.training.helpers import Clips, train

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


def block(name, cin, cout, width, kernel, *, gain="weight", shortcut=True):
    """Yield names and shapes of a residual block, in their order."""
    up = name.startswith("up_layers")

    def norm(channels):
        return (1, channels, 1, 1) if gain == "gain" else (channels,)

    def conv(a, b, k):
        return (a, b, k, k) if up else (b, a, k, k)

    yield from ((f"{name}.GroupNorm_0.{leaf}", norm(cin)) for leaf in (gain, "bias"))
    yield from ((f"{name}.Conv_0.weight", conv(cin, cout, 3)), (f"{name}.Conv_0.bias", (cout,)))
    yield from ((f"{name}.Conv_time.weight", (cout, width, 3)), (f"{name}.Conv_time.bias", (cout,)))
    yield from ((f"{name}.GroupNorm_1.{leaf}", norm(cout)) for leaf in (gain, "bias"))
    yield from ((f"{name}.Conv_1.weight", conv(cout, cout, 3)), (f"{name}.Conv_1.bias", (cout,)))
    if shortcut:
        yield (f"{name}.Conv_2.weight", conv(cin, cout, kernel))
        yield (f"{name}.Conv_2.bias", (cout,))


def ncsnpp_shapes():
    """Two levels of 8 and 16 channels, modules numbered in the order in which they are made."""
    plain = {0: [("W", (8,))], 1: [("weight", (32, 16)), ("bias", (32,))]}
    plain |= {
        2: [("weight", (32, 32)), ("bias", (32,))],
        3: [("weight", (8, 4, 3, 3)), ("bias", (8,))],
    }
    plain |= {6: [("Conv_0.weight", (8, 4, 1, 1)), ("Conv_0.bias", (8,))]}
    nin = [(f"NIN_{i}.{leaf}", (16,) * (1 + (leaf == "W"))) for i in range(4) for leaf in "Wb"]
    plain |= {9: [("GroupNorm_0.weight", (16,)), ("GroupNorm_0.bias", (16,)), *nin]}
    for number, channels in ((13, 16), (18, 8)):
        plain |= {number: [("weight", (channels,)), ("bias", (channels,))]}
        plain |= {number + 1: [("weight", (4, channels, 3, 3)), ("bias", (4,))]}
    blocks = {4: (8, 8), 5: (8, 8, True), 7: (8, 16), 8: (16, 16), 10: (16, 16), 11: (32, 16)}
    blocks |= {12: (24, 16), 15: (16, 16, True), 16: (24, 8), 17: (16, 8)}
    yield from (("output_layer.weight", (2, 4, 1, 1)), ("output_layer.bias", (2,)))
    for number in range(20):
        name = f"all_modules.{number}"
        if number in plain:
            yield from ((f"{name}.{leaf}", shape) for leaf, shape in plain[number])
        else:
            cin, cout, *resampled = blocks[number]
            shortcut = bool(resampled) or cin != cout
            yield from block(name, cin, cout, 32, 1, shortcut=shortcut)


def bc_ncsnpp_shapes():
    """Three levels of 32, 32 and 64 channels."""
    yield ("temp_enc.W", (128,))
    for layer, width in (("lin_layer1", 256), ("lin_layer2", 512)):
        yield (f"temp_enc.{layer}.lin_layer.weight", (512, width))
        yield (f"temp_enc.{layer}.lin_layer.bias", (512,))
    yield from (("in_layer.weight", (32, 4, 3, 3)), ("in_layer.bias", (32,)))
    for name, cin, cout in (
        *(("down_layers.0", 32, 32), ("down_layers.1", 32, 64), ("bottleneck_layers.0", 64, 64)),
        *(("bottleneck_layers.1", 64, 64), ("up_layers.0", 128, 32), ("up_layers.1", 64, 32)),
    ):
        yield from block(name, cin, cout, 512, 3, gain="gain")
    yield from (("out_layers.0.gain", (1, 32, 1, 1)), ("out_layers.0.bias", (1, 32, 1, 1)))
    yield from (("out_layers.2.weight", (4, 32, 3, 3)), ("out_layers.2.bias", (4,)))
    yield from (("out_layers.3.weight", (2, 4, 1, 1)), ("out_layers.3.bias", (2,)))


def make(path, prefix="dnn.", hyper=(), frozen=True, **changes):
    """Write a checkpoint in their form; return its content."""
    hyper = {**HYPER, **dict(hyper)}
    shapes = dict(ncsnpp_shapes() if hyper["backbone"] == "ncsnpp" else bc_ncsnpp_shapes())
    generator = torch.Generator().manual_seed(0)
    weights = {n: 0.2 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    state = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    if hyper["backbone"] == "bc_ncsnpp":
        state[f"{prefix}out_layers.0.counts"] = torch.ones(1, 1, 4)
    state["mrstftloss.window"] = torch.ones(3)
    shadow = [t + 1 for n, t in weights.items() if frozen or not n.endswith("W")]
    module = ModuleType("sgmse.data_module")
    module.SpecsDataModule = type("SpecsDataModule", (), {"__module__": module.__name__})
    content = {
        "state_dict": state, "epoch": 7, "callbacks": {"best": np.float64(1.0)},
        "hyper_parameters": {**hyper, "data_module_cls": module.SpecsDataModule},
        "ema": {"decay": 0.999, "shadow_params": shadow, "collected_params": None},
        **changes,
    }  # fmt: skip
    sys.modules["sgmse"] = sys.modules["sgmse.data_module"] = module
    try:
        torch.save(content, path)
    finally:
        del sys.modules["sgmse"], sys.modules["sgmse.data_module"]
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
    assert "sgmse.data_module.SpecsDataModule" in " ".join(notes)
    cfg = model.cfg
    assert cfg.model.name == ("bc_ncsnpp" if hyper else "ncsnpp")
    assert cfg.training.loss == ("data_prediction" if hyper else "weighted_score")
    assert cfg.diffusion_buffer.time_sampling == ("linspace" if hyper else "random")
    assert cfg.model.history_time == 1
    assert (cfg.diffusion_buffer.buffer_size, cfg.num_frames, cfg.audio.num_frames) == (3, 16, 16)


def test_averaged_and_raw_weights(tmp_path):
    made = make(tmp_path / "c.ckpt", frozen=False)  # torch_ema without what needs no gradient
    first = made.weights["output_layer.bias"]
    averaged, _ = import_checkpoint(tmp_path / "c.ckpt")
    assert torch.equal(averaged.network.last.bias, first + 1)
    assert torch.equal(averaged.network.embed_time.frequencies, made.weights["all_modules.0.W"])
    assert torch.equal(import_checkpoint(tmp_path / "c.ckpt", raw=True)[0].network.last.bias, first)
    # Saved at a validation: the averaged weights are in the model, the others beside them.
    collected = [tensor + 2 for tensor in made.weights.values()]
    ema = {**made.content["ema"], "collected_params": collected}
    make(tmp_path / "c.ckpt", ema=ema)
    raw = import_checkpoint(tmp_path / "c.ckpt", raw=True)[0]
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
    torch.load(tmp_path / "c.ckpt", weights_only=False, pickle_module=_with_stubs())
    assert target.exists(), "the test's file must be able to do harm"


def _with_stubs():
    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return object if module.startswith("sgmse") else super().find_class(module, name)

    return SimpleNamespace(__name__="stubs", Unpickler=Unpickler)


@pytest.mark.parametrize(
    ("hyper", "part"),
    [
        ({"backbone": "ncsnpp_v2", "sde": "ouve"}, "sgmse"),
        ({"ch_mult": [1, 2, 2, 2, 2]}, "attention"),
        ({"ch_mult": [1, 1]}, "do not fit|no place"),
        ({"nf": 16}, "shape"),
        ({"nf": "wide"}, "base_channels"),
        ({"diff_buffer_range": 30}, "int"),
        ({"output_scale": "sigma"}, "output_scale"),
        ({"transform_type": "log"}, "transform_type"),
        ({"loss_type": "gencon_mel"}, "loss_type"),
        ({"theta": -1}, "theta"),
        ({**JOURNAL, "bwr": True}, "bwr"),
        ({**JOURNAL, "strides": [2, 4]}, "strides"),
    ],
)
def test_what_is_not_here_is_refused_in_one_line(tmp_path, hyper, part):
    make(tmp_path / "c.ckpt", hyper=hyper)
    with pytest.raises(CheckpointError, match=part) as refused:
        import_checkpoint(tmp_path / "c.ckpt")
    assert "\n" not in str(refused.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.ckpt"
    made = make(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        import_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="hyper_parameters"):
        import_checkpoint(path)
    make(path, ema={"shadow_params": made.content["ema"]["shadow_params"][:-1]})
    with pytest.raises(CheckpointError, match="--raw"):
        import_checkpoint(path)


@pytest.mark.parametrize("hyper", [{}, JOURNAL], ids=["interspeech", "journal"])
def test_an_imported_checkpoint_enhances_and_trains_on(tmp_path, hyper, capfd):
    make(tmp_path / "c.ckpt", hyper=hyper)
    folder = tmp_path / "model"
    cli.main(["import", str(tmp_path / "c.ckpt"), "-o", str(folder)])
    assert str(folder) in capfd.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["import", str(tmp_path / "c.ckpt"), "-o", str(folder)])
    soundfile.write(tmp_path / "in.wav", 0.1 * np.sin(np.arange(4000)), 16000)
    cli.main(
        [
            "enhance",
            str(tmp_path / "in.wav"),
            "-o",
            str(tmp_path / "out.wav"),
            "--model",
            str(folder),
        ]
    )
    assert soundfile.info(tmp_path / "out.wav").frames == 4000
    cfg = DiffusionBufferModel.from_pretrained(folder).cfg
    cfg = cfg.override("training.use_amp=false", "training.num_workers=0")
    run = train(cfg, Clips(2), None, tmp_path / "run", device="cpu", start_check_point=folder)
    assert np.isfinite(next(run).loss)
    run.close()
