"""What an audit measures, against numpy."""

import shutil
import time

import numpy as np
import pytest
import torch

from diffbuf_lib.diagnostics.checks_data import audit, measure, shared_targets
from tests.diagnostics.clips import Items, config, make_split, opened, samples, stem, write


@pytest.mark.law
def test_facts_of_a_clip_are_those_of_its_files(tmp_path):
    root = make_split(tmp_path, 3)
    facts = audit(opened(root, config()))
    assert facts.size == len(facts.clips) == 3
    for i, clip in enumerate(sorted(facts.clips, key=lambda clip: clip.name)):
        mix, target, noise = (samples(stem(root, n, i)) for n in ("mixture", "vocals", "noise"))
        assert clip.target.rms == pytest.approx(np.sqrt((target**2).mean()))
        assert clip.mix.peak == pytest.approx(abs(mix).max())
        assert clip.mix.dc == pytest.approx(mix.mean(), abs=1e-7)
        expected = 10 * np.log10((target**2).mean() / (noise**2).mean())
        assert clip.snr_db == pytest.approx(expected, abs=1e-3)
        assert clip.residual_db < -100
        assert clip.wave.shape == (1, 1600)


@pytest.mark.law
def test_a_residual_is_found_in_dB(tmp_path):
    root = make_split(tmp_path, 2)
    target = samples(stem(root, "vocals", 0))
    write(stem(root, "mixture", 0), samples(stem(root, "mixture", 0)) + 0.1 * target)
    by_name = {clip.name: clip for clip in audit(opened(root, config())).clips}
    (clip,) = [clip for name, clip in by_name.items() if "sample_00000" in name]
    assert clip.residual_db == pytest.approx(-20, abs=0.01)


@pytest.mark.law
def test_non_finite_and_clipped_samples_are_counted():
    wave = torch.tensor([[0.5, torch.nan, -1.0, torch.inf], [0.25, 0.25, 0.25, 0.25]])
    facts = measure(wave)
    assert facts.nonfinite == 2
    assert facts.clipped == pytest.approx(1 / 8)
    assert facts.peak == 1.0
    assert facts.dc == 0.25
    assert not facts.silent
    assert measure(torch.zeros(1, 8)).silent


@pytest.mark.law
def test_a_sample_spans_the_set_and_keeps_to_its_limits(tmp_path):
    wave = torch.rand(1, 16)

    class Slow(Items):
        def __getitem__(self, index):
            time.sleep(0.02)
            return wave, wave

    many = Slow(*[(wave, wave)] * 1000)
    facts = audit(many, limit=20)
    names = sorted(int(clip.name.split()[-1]) for clip in facts.clips)
    assert names == list(range(0, 1000, 50))
    short = audit(many, limit=1000, seconds=0.1)
    assert 1 <= len(short.clips) < 50
    assert max(int(clip.name.split()[-1]) for clip in short.clips) > 0


def test_an_unexpected_failure_of_a_data_set_is_told_with_the_clip():
    class Broken(Items):
        def __getitem__(self, index):
            raise ZeroDivisionError("deep inside")

    (clip,) = audit(Broken(None)).broken
    assert "ZeroDivisionError" in str(clip.error)
    assert "clip 0" in str(clip.error)


@pytest.mark.law
def test_shared_targets_are_found_by_content_not_by_name(tmp_path):
    cfg = config()
    train, valid = make_split(tmp_path / "t", 4), make_split(tmp_path / "v", 3, seed=9)
    assert shared_targets(opened(train, cfg), opened(valid, cfg)) == []
    # the same size, the same middle, another end: not the same file
    path = stem(valid, "vocals", 0)
    content = bytearray(stem(train, "vocals", 0).read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert shared_targets(opened(train, cfg), opened(valid, cfg)) == []
    shutil.copy(stem(train, "vocals", 3), stem(valid, "vocals", 2))
    pair = (str(stem(train, "vocals", 3)), str(stem(valid, "vocals", 2)))
    assert shared_targets(opened(train, cfg), opened(valid, cfg)) == [pair]
