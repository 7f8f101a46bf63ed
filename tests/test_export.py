"""A model without torch is the model: as a graph, in a stream, in a script of its own."""

import json
import shutil
import subprocess
import sys
from collections import UserDict
from types import SimpleNamespace

import pytest
import soundfile
import torch

import diffbuf_lib.graph
from diffbuf_lib import OnlineEnhancer, export
from diffbuf_lib.config import build_config
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.export import export_model
from diffbuf_lib.graph import LIMIT, GraphSampler, map_leaves, worst_error, write_hop
from diffbuf_lib.live import choose_backend, streams_in_time
from diffbuf_lib.registry import NETWORKS
from tests.conftest import TINY, call, make_model, refused, seeded, stream
from tests.test_plugins import ToyNet, ToyOptions

pytest.importorskip("onnxscript")
BLOCK_CAUSAL = (
    "model={name: block_causal, base_channels: 8, channel_multipliers: [1, 2], data_scale: 0.1}",
    "preprocessing.level_seconds=0.5",
    "training.loss=data_prediction",
    "audio.stft={n_fft: 64, win_length: 64, hop_length: 32}",  # F = 33, and 16 divides no draw
)
TOY = ("model={name: toy_export, options: {width: 5}}", "sde.type=ouve")


@pytest.fixture(scope="module", params=[BLOCK_CAUSAL, TOY], ids=["block_causal", "plug-in"])
def exported(request, tmp_path_factory):
    """A model, the folder that it was exported to, and what `export_model` told."""
    NETWORKS.register("toy_export", options=ToyOptions)(ToyNet)
    model = make_model(build_config(TINY, request.param)).eval()
    folder = tmp_path_factory.mktemp("exported")
    yield SimpleNamespace(model=model, folder=folder, told=export_model(model, folder))
    del NETWORKS["toy_export"]


@pytest.fixture
def cache(exported, tmp_path, monkeypatch):
    """The exported graph where `OnlineEnhancer` looks for it, and no exporter to make another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = f"{diffbuf_lib.graph.fingerprint(exported.model)}-4.onnx"
    (tmp_path / "diffbuf").mkdir()
    (tmp_path / "diffbuf" / name).write_bytes((exported.folder / "hop.onnx").read_bytes())
    made = []
    monkeypatch.setattr(diffbuf_lib.graph, "write_hop", lambda *args: made.append(args))
    yield tmp_path / "diffbuf" / name
    assert not made


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))


@pytest.mark.law
def test_a_graph_is_the_model(exported):
    about = json.loads((exported.folder / "stream.json").read_text())
    assert exported.told.error == about["worst_error"] <= LIMIT
    assert (about["delay"], len(about["times"])) == (4, 4)


@pytest.mark.law
def test_weights_of_half_the_bytes_cost_a_thousandth(exported, tmp_path):
    """Not the running level of a stream whose power falls to where float16 has only zero."""
    graph = tmp_path / "hop.onnx"
    shutil.copy(exported.folder / "hop.onnx", graph)
    export._convert(graph, "fp16")
    assert graph.stat().st_size <= (exported.folder / "hop.onnx").stat().st_size
    assert worst_error(exported.model, graph, hops=250) < 3e-3


@pytest.mark.law
def test_streams_of_a_graph_are_streams_of_torch(exported, cache):
    """One by one, and side by side."""
    signals = 0.1 * torch.randn(3, 900, generator=seeded())
    options = {"seed": 5, "batch": 3}
    side_by_side = stream(OnlineEnhancer(exported.model, **options, backend="onnx"), signals, [77])
    assert_same(side_by_side, stream(OnlineEnhancer(exported.model, **options), signals))
    one = OnlineEnhancer(exported.model, seed=5, backend="onnx")
    found = stream(one, signals[0])
    assert_same(found, stream(OnlineEnhancer(exported.model, seed=5), signals[0]))
    assert torch.equal(stream(one, signals[0]), found)
    sampler = GraphSampler(exported.model.sampler(), cache)
    state = sampler.start(2, exported.model.framing.num_bins, seeded())
    alone = [map_leaves(lambda x, i=i: x[i : i + 1] if isinstance(x, torch.Tensor) else x, state)
             for i in range(2)]  # fmt: skip
    for hop in range(6):
        R = torch.randn_like(state.V[..., 0])
        z = sampler.draw(R, seeded(hop))
        together = sampler.move(state, R, z)
        for i in range(2):
            assert_same(sampler.move(alone[i], R[i : i + 1], z[i : i + 1]), together[i : i + 1])


@pytest.mark.law
def test_the_script_without_torch_gives_the_librarys_samples(exported, tmp_path):
    signal = 0.1 * torch.randn(1003, generator=seeded())
    soundfile.write(tmp_path / "in.wav", signal.numpy(), 16000, subtype="FLOAT")
    without = (
        "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'diffbuf_lib']); "
        f"sys.argv[1:] = ['in.wav', 'out.wav']; "
        f"runpy.run_path({str(exported.folder / 'run.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", without], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert_same(torch.from_numpy(found), stream(OnlineEnhancer(exported.model), signal))
    assert rate == 16000


@pytest.mark.law
def test_a_graph_of_other_weights_is_refused(exported):
    other = make_model(exported.model.cfg, seed=1)
    assert worst_error(other, exported.folder / "hop.onnx", hops=8) > 1e-2


def test_a_state_that_is_no_tree_of_tensors_is_refused(exported, monkeypatch, tmp_path):
    if not isinstance(exported.model.network, ToyNet):
        pytest.skip("once is enough")

    start = exported.model.network.start
    monkeypatch.setattr(exported.model.network, "start", lambda *a, **o: UserDict(start(*a, **o)))
    with pytest.raises(ConfigError, match=r"1e-04.*toy_export|cannot be exported"):
        write_hop(exported.model, tmp_path / "hop.onnx")


def test_a_graph_that_no_longer_agrees_is_made_again(exported, cache, monkeypatch):
    monkeypatch.setattr(diffbuf_lib.graph, "worst_error", lambda *_, **__: 1.0)
    made = []

    def write(model, path, delay):
        made.append(delay)
        path.write_bytes(b"new")

    monkeypatch.setattr(diffbuf_lib.graph, "write_hop", write)
    assert diffbuf_lib.graph.cached_graph(exported.model, 4) == cache
    assert (cache.read_bytes(), made) == (b"new", [4])


def test_auto_and_the_bench_find_a_backend(exported, cache, monkeypatch):
    times = {"onnx": 1.0}
    measured = lambda *_, **o: SimpleNamespace(  # noqa: E731
        quantile=lambda q: times[o.get("backend", "torch")] * o.get("batch", 1), hop_ms=11.0
    )
    monkeypatch.setattr(diffbuf_lib.live, "latency_report", measured)
    for torch_time, faster in ((2.0, "onnx"), (0.5, "torch")):
        times["torch"] = torch_time
        assert choose_backend(exported.model) == (faster, "")
    assert streams_in_time(exported.model, "onnx")[0] == 10
    times["onnx"] = 12.0
    assert streams_in_time(exported.model, "onnx")[0] == 0


def test_a_model_without_a_hop_and_a_missing_package_say_so(tiny_cfg, monkeypatch, tmp_path):
    conv, model = make_model(tiny_cfg), make_model(tiny_cfg.override(*BLOCK_CAUSAL))
    refused(lambda: export_model(conv, tmp_path), "model.name conv")
    assert choose_backend(conv)[0] == "torch"
    refused(lambda: OnlineEnhancer(model, backend="onnx", precision="bf16"), "bf16")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(lambda: export_model(model, tmp_path), "diffbuf[export]")
    refused(lambda: export_model(model.double(), tmp_path), "float64")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp16", 1e-2), ("int8", 0.3)])
def test_smaller_graphs_of_the_bundled_model(monkeypatch, capsys, tmp_path, precision, limit):
    status, out, err = call(
        monkeypatch, capsys, "export", "diffbuf/cpu-demo", "-o", tmp_path, "--precision", precision
    )
    assert status == 0, err
    assert 1e-4 < json.loads((tmp_path / "stream.json").read_text())["worst_error"] < limit
    assert precision in out
    assert (tmp_path / "hop.onnx").stat().st_size < 3e6
