import json

import pytest

import recipes.demo.demo_set as demo_module
from diffbuf_lib.data import DNLMDataset, MixingDataset, read_info
from recipes.demo.demo_set import build_demo
from tests.conftest import refused
from tests.data.conftest import content

SMALL = {"train": 5, "valid": 2, "seconds": 0.5}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Fewer sentences and drones than the real one: the path is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "SENTENCES", demo_module.SENTENCES[:3])
        patch.setattr(demo_module, "_DRONES", 3)
        patch.setattr(demo_module, "_DRONE_SECONDS", 6.5)
        yield build_demo(tmp_path_factory.mktemp("demo") / "set", **SMALL)


def test_the_demo_set_trains_validates_and_can_be_listened_to(demo):
    for split, count, seconds in (("train", 5, 0.5), ("valid", 2, 0.5), ("test", 3, 6.0)):
        assert len(DNLMDataset(demo / split, 8000)) == count
        info = read_info(demo / split / "sample_00000" / "mixture.wav")
        assert info.frames == round(seconds * 16000)
        for record in json.loads((demo / split / "metadata.json").read_text())[split]:
            assert -5 <= record["input_snr"] <= 10
            held_out = record["speech_source"].split("/")[0].removeprefix("audioeval-")
            assert (held_out in demo_module.VALID_LANGUAGES) == (split != "train")
    assert len(MixingDataset(demo / "sources", 8000, snr=(-5.0, 10.0))) == 3 + 9


@pytest.mark.law
def test_the_same_arguments_give_the_same_bytes_and_others_are_refused(demo, tmp_path):
    assert content(build_demo(tmp_path / "again", **SMALL)) == content(demo)
    assert build_demo(demo, **SMALL) == demo
    refused(lambda: build_demo(demo, **SMALL, seed=1), "seed 0, not 1")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "find_spec", lambda name: None)
    refused(lambda: build_demo(tmp_path / "set"), "pip install 'diffbuf[demo]'")
    assert not (tmp_path / "set").exists()
