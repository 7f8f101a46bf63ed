"""Export a model to a folder that runs without torch: graph, initial state, settings, script."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import diffbuf_lib
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.graph import OPSET, hop_sampler, quiet, tensors, worst_error, write_hop
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.streaming import OnlineEnhancer

GraphPrecision = Literal["fp32", "fp16", "int8"]
Format = Literal["onnx", "executorch"]
HOPS = 500  # over which the graph is compared
SMALL = 256  # elements: smaller tensors stay in float32


class Exported(NamedTuple):
    """What `export_model` wrote."""

    graph: Path  # in the folder
    precision: GraphPrecision
    error: float  # largest difference from the model in a hop, relative to the peak

    @property
    def folder(self) -> Path:
        """The folder that was written."""
        return self.graph.parent

    def __str__(self) -> str:
        mobile, script = self.graph.suffix == ".pte", self.folder / "run.py"
        kind = f"{self.graph.stat().st_size / 1e6:.1f} MB, {self.precision}, "
        kind += "XNNPACK" if mobile else f"opset {OPSET}"
        run = f" and run.py, which needs no torch: python {script} noisy.wav clean.wav"
        return (
            f"{self.graph}: {kind}; worst error of {HOPS} hops {self.error:.1e} of the peak\n"
            f"beside it start.bin, stream.json{'' if mobile else run}"
        )


def export_model(
    model: DiffusionBufferModel,  # in float32 on the CPU, with a network that streams
    folder: str | Path,
    *,
    # fp16: for the weights in the file, which is half as large; int8: for matrix products; both
    # add an error.
    precision: GraphPrecision = "fp32",
    delay: int | None = None,  # d, 1 to B frames, of a data-prediction model; None for B
    format: Format = "onnx",  # executorch: one stream, for mobile apps; no run.py
) -> Exported:
    """Write hop.onnx or hop.pte (see `graph.write_hop`), start.bin, stream.json and run.py.

    start.bin is the initial state of one stream, float32: state.0, state.1, ... concatenated. Set
    the last Kb frames of state.0 to noise, start_sigma of stream.json times CN(0, 1). Errors as in
    `graph.write_hop`; raises ConfigError for executorch with a precision other than fp32.
    """
    sampler, folder, mobile = hop_sampler(model, delay), Path(folder), format == "executorch"
    if mobile and precision != "fp32":
        raise ConfigError(f"--precision {precision} is only for ONNX: leave it out with executorch")
    with tempfile.TemporaryDirectory() as work:
        graph = Path(work) / ("hop.pte" if mobile else "hop.onnx")
        error = write_hop(model, graph, delay, HOPS)
        if precision != "fp32":
            with quiet():
                _convert(graph, precision)
            error = worst_error(model, graph, delay, HOPS)
        folder.mkdir(parents=True, exist_ok=True)
        for other in ("hop.onnx", "hop.pte", "run.py"):  # of an earlier export
            (folder / other).unlink(missing_ok=True)
        shutil.copyfile(graph, folder / graph.name)
    state = sampler.start(1, model.framing.num_bins)
    state.V.zero_()
    flat = [np.ravel(tensor.numpy()).view(np.float32) for tensor in tensors(state)]
    np.concatenate(flat).tofile(folder / "start.bin")
    about = _about(model, delay) | {"precision": precision, "worst_error": error}
    if not mobile:
        shutil.copyfile(Path(__file__).with_name("standalone.py"), folder / "run.py")
        about["opset"] = OPSET
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
    (folder / "stream.json").write_text(f"{{\n{lines}\n}}\n")
    return Exported(folder / graph.name, precision, error)


def _about(model: DiffusionBufferModel, delay: int | None) -> dict[str, object]:
    """Return the settings of a stream, as JSON-serialisable values."""
    enhancer, sampler = OnlineEnhancer(model, delay=delay), model.sampler(delay)
    framing, rate = model.framing, model.cfg.audio.sample_rate
    return {
        "diffbuf": diffbuf_lib.__version__,
        "sample_rate": rate,
        "n_fft": framing.n_fft,
        "hop_length": framing.hop_length,
        "window": framing.window.tolist(),
        "alpha": framing.alpha,
        "beta": framing.beta,
        "level_seconds": model.cfg.preprocessing.level_seconds,  # within the graph, if not null
        "times": sampler.t.tolist(),
        "start_sigma": sampler.next_std.tolist(),
        "delay": sampler.delay,
        "latency_ms": 1e3 * enhancer.latency_samples / rate,
        "worst_latency_ms": 1e3 * enhancer.worst_latency_samples / rate,
    }


def _convert(graph: Path, precision: GraphPrecision) -> None:
    if precision == "int8":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(graph, graph.with_name("int8.onnx"))
        graph.with_name("int8.onnx").replace(graph)
        return
    # Not the runtime's converter: it also converts inputs and states to float16, where the squares
    # in a running level underflow to zero.
    import onnx

    model = onnx.load(graph)
    for weight in model.graph.initializer:
        values, name = onnx.numpy_helper.to_array(weight), weight.name
        if values.dtype == np.float32 and values.size >= SMALL:
            largest = np.finfo(np.float16).max
            rounded = values.clip(-largest, largest).astype(np.float16)
            half = onnx.numpy_helper.from_array(rounded, f"{name}.half")
            weight.CopyFrom(half)
            cast = onnx.helper.make_node("Cast", [half.name], [name], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)
    onnx.save(model, graph)
