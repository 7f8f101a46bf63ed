"""A hop for ExecuTorch is the model's hop; without the package it says what to install."""

import importlib.util

import pytest

from diffbuf_lib.config import build_config
from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.export import export_model
from diffbuf_lib.graph import LIMIT
from tests.conftest import TINY, make_model
from tests.test_export import BLOCK_CAUSAL

INSTALLED = importlib.util.find_spec("executorch") is not None
RECURRENT = (
    "model={name: recurrent, base_channels: 8, channel_multipliers: [1, 2], data_scale: 0.1}",
    *BLOCK_CAUSAL[1:],
)


@pytest.mark.law
@pytest.mark.skipif(
    not INSTALLED, reason="left out: executorch, which has no place beside pytest 9"
)
@pytest.mark.parametrize("keys", [BLOCK_CAUSAL, RECURRENT], ids=["block_causal", "recurrent"])
def test_a_program_is_the_model(keys, tmp_path):
    model = make_model(build_config(TINY, keys)).eval()
    told = export_model(model, tmp_path, format="executorch")
    assert told.graph == tmp_path / "hop.pte"
    assert told.error <= LIMIT
    assert model.memory_format == "channels_last", "as it was"


@pytest.mark.skipif(INSTALLED, reason="it is there")
def test_without_the_package_it_says_what_to_install(tmp_path):
    model = make_model(build_config(TINY, BLOCK_CAUSAL))
    with pytest.raises(MissingExtraError, match=r"pip install executorch==\d"):
        export_model(model, tmp_path / "out", format="executorch")
    assert not (tmp_path / "out").exists()


def test_it_is_in_float32_only(tmp_path):
    model = make_model(build_config(TINY, BLOCK_CAUSAL))
    with pytest.raises(ConfigError, match="--precision fp16"):
        export_model(model, tmp_path, format="executorch", precision="fp16")
