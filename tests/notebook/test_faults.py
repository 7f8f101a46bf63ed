"""What the failure gallery of the notebooks stands on: faults that are caused, and no others."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.errors import DiffbufError, NonFiniteError, OutOfMemoryError
from diffbuf_lib.notebook import faults, plots
from tests.training.helpers import Clips, config

CFG = config("training.num_steps=3")


def test_caught_returns_the_error_and_complains_without_one():
    error = faults.caught(lambda: config("diffusion_buffer.t_eps=0"))
    assert isinstance(error, DiffbufError)
    with pytest.raises(AssertionError, match="nothing failed"):
        faults.caught(lambda: None)


def test_read_wraps_and_shortens_paths():
    root = Path("some") / "where"
    long = DiffbufError(f"{root / 'data' / 'a.wav'} " + "is far too long " * 20)
    lines = faults.read(long, root, width=60).splitlines()
    assert lines[0].startswith(f"DiffbufError: {Path('data') / 'a.wav'} is")
    assert max(map(len, lines)) <= 60
    assert len(lines) > 3


def test_small_overrides_fit_any_config():
    for tree in (
        {},
        {"sde": {"type": "ouve"}, "diffusion_buffer": {"t_max": 1.0}},
        {"model": {"name": "block_causal"}, "training": {"loss": "data_prediction"}},
    ):
        cfg = build_config(tree, faults.SMALL)
        assert (cfg.model.name, cfg.sde.type, cfg.training.loss) == ("conv", "bbed", "score")


def test_mono_averages_and_only_that():
    class Stereo(Clips):
        def __getitem__(self, index):
            mix, target = super().__getitem__(index)
            return torch.cat([mix, 3 * mix]), torch.cat([target, -target])

    mono, plain = faults.Mono(Stereo()), Clips()
    mix, target = mono[2]
    torch.testing.assert_close(mix, 2 * plain[2][0])
    assert target.shape == (1, 4000)
    assert not target.any()
    assert (len(mono), mono.name(2)) == (7, "clip_002.wav")
    mono.set_epoch(5)
    assert not torch.equal(mono[2][0], mix)


def test_spoilt_spoils_one_sample_of_one_mixture():
    spoilt = faults.Spoilt(Clips(), bad=1)
    mix, target = spoilt[1]
    assert (~mix.isfinite()).nonzero().tolist() == [[0, 2000]]
    assert target.isfinite().all()
    assert all(wave.isfinite().all() for i in (0, 2, 3) for wave in spoilt[i])


def test_few_steps_starts_anew_or_resumes(tmp_path):
    folder = tmp_path / "run"
    first = [record.loss for record in faults.few_steps(CFG, Clips(), folder)]
    again = [record.loss for record in faults.few_steps(CFG, Clips(), folder)]
    assert first == again
    assert len(first) == 3
    longer = CFG.override("training.num_steps=5")
    assert [r.step for r in faults.few_steps(longer, Clips(), folder, resume=True)] == [4, 5]


def test_the_spoilt_clip_ends_a_run(tmp_path):
    error = faults.caught(lambda: faults.few_steps(CFG, faults.Spoilt(Clips(), 1), tmp_path / "r"))
    assert isinstance(error, NonFiniteError)
    assert "clip_001.wav" in str(error)


def test_hungry_refuses_more_than_it_can_take(tmp_path):
    hungry = faults.Hungry(CFG, capacity=1)
    error = faults.caught(lambda: faults.few_steps(CFG, Clips(), tmp_path / "a", model=hungry))
    assert isinstance(error, OutOfMemoryError)
    assert "12.00 GiB more were asked for" in str(error)
    one = CFG.override("training.batch_size=1")
    assert len(faults.few_steps(one, Clips(), tmp_path / "b", model=faults.Hungry(one, 1))) == 3


def test_a_pair_is_written_with_its_nan(tmp_path):
    mix, target = Clips()[0]
    split = faults.write_pair(tmp_path / "split", mix, target, 16000, nan_at=17)
    wave, rate = soundfile.read(split / "sample_00000" / "mixture.wav", dtype="float32")
    assert rate == 16000
    assert np.flatnonzero(np.isnan(wave)).tolist() == [17]
    assert mix.isfinite().all(), "the caller's clip is not changed"
    clean, _ = soundfile.read(split / "sample_00000" / "vocals.wav", dtype="float32")
    np.testing.assert_array_equal(clean, target[0])


def test_largest_values_are_bars_up_to_their_value():
    values = {"first": 2.0, "zero": 0.0, "loud": 1e6, "gone": float("nan")}
    axes = plots.largest_values(values, 65504, "float16 ends here", bad="loud").axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(ends, [2.0, 1e6])
    assert [text.get_text() for text in axes.texts] == ["0", "no finite value"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(values)
    limit = next(line for line in axes.get_lines() if line.get_label() == "float16 ends here")
    assert list(limit.get_xdata()) == [65504, 65504]
    assert axes.get_xlim()[1] > 1e6
    red, blue = axes.patches[1].get_facecolor(), axes.patches[0].get_facecolor()
    assert red != blue, "the first bad value stands out"
