import json
import math
import shutil
import urllib.error

import numpy as np
import pytest
import torch
import torchaudio.datasets

import diffbuf_lib.data.build as build_module
from diffbuf_lib.data import DNLMDataset, build_dnlm, download_librispeech, read_audio, read_info
from tests.conftest import refused
from tests.data.conftest import content, noise_wave, save

SMALL = {"train": 6, "valid": 3, "seconds": 0.5, "seed": 3}


@pytest.fixture
def built(tmp_path, sources):
    return build_dnlm(*sources, tmp_path / "out", **SMALL)


def records(folder, split):
    return json.loads((folder / split / "metadata.json").read_text())[split]


def speakers(folder, split):
    return {record["speech_source"].split("/")[0] for record in records(folder, split)}


@pytest.mark.law
def test_the_files_have_the_drawn_snr_add_up_and_are_no_pauses(built):
    assert DNLMDataset(built / "train", 8000, training=False)[5][0].shape == (1, 8000)
    for split in ("train", "valid"):
        for record in records(built, split):
            folder = built / split / record["id"]
            mix, target, noise = (
                read_audio(folder / f"{stem}.wav")[0] for stem in ("mixture", "vocals", "noise")
            )
            assert torch.equal(mix, target + noise)
            powers = [float(wave.double().square().sum()) for wave in (target, noise)]
            found = 10 * math.log10(powers[0] / powers[1])
            assert found == pytest.approx(record["input_snr"], abs=0.05)
            assert -30 <= record["input_snr"] <= 0
            assert 5 <= record["speech_distance"] <= 20
            assert float(mix.abs().max()) < 1
            assert float((target.abs() > 0.02 * target.abs().max()).float().mean()) > 0.05


@pytest.mark.law
def test_train_and_valid_share_no_speaker_and_no_noise(built):
    train, valid = records(built, "train"), records(built, "valid")
    assert not speakers(built, "train") & speakers(built, "valid")
    assert not {r["noise_source"] for r in train} & {r["noise_source"] for r in valid}
    # Every file is used before any is used twice.
    used = [record["speech_source"] for record in train]
    assert len(set(used)) == min(len(used), 6)


@pytest.mark.law
def test_the_bytes_follow_from_the_seed_whatever_the_processes(tmp_path, sources, built):
    one = content(built)
    assert content(build_dnlm(*sources, tmp_path / "two", **SMALL, processes=2)) == one
    other = content(build_dnlm(*sources, tmp_path / "other", **SMALL | {"seed": 4}))
    assert not [name for name in one if name.endswith("mixture.wav") and one[name] == other[name]]


@pytest.mark.law
def test_a_stopped_build_goes_on_and_ends_the_same(tmp_path, sources, built, monkeypatch):
    out, made, most = tmp_path / "stopped", [], 4
    real = build_module.make_sample

    def counting(sample):
        if len(made) == most:
            raise KeyboardInterrupt
        made.append(sample.folder.relative_to(out).as_posix())
        real(sample)

    monkeypatch.setattr(build_module, "make_sample", counting)
    with pytest.raises(KeyboardInterrupt):
        build_dnlm(*sources, out, **SMALL)
    assert not list(out.rglob("metadata.json"))  # written last
    (out / "train" / "sample_00001" / "noise.wav").unlink()
    save(out / "train" / ".sample_00004.tmp" / "mixture.wav", [[0.0]])  # by a killed process
    kept = (out / "train" / "sample_00000" / "mixture.wav").stat().st_mtime_ns
    made.clear()
    most = 99
    build_dnlm(*sources, out, **SMALL)
    wanted = [("train", i) for i in (1, 4, 5)] + [("valid", i) for i in range(3)]
    assert sorted(made) == [f"{split}/sample_{i:05}" for split, i in wanted]
    assert (out / "train" / "sample_00000" / "mixture.wav").stat().st_mtime_ns == kept
    assert content(out) == content(built)
    made.clear()
    build_dnlm(*sources, out, **SMALL)
    assert not made


def test_other_arguments_or_sources_are_refused(tmp_path, sources, built):
    sources = (shutil.move(sources[0], tmp_path / "elsewhere"), sources[1])  # may move
    before = content(built)
    build_dnlm(*sources, built, **SMALL)
    refused(lambda: build_dnlm(*sources, built, **SMALL | {"seed": 9}), "seed 3, not 9")
    save(sources[1] / "drone9.wav", np.full((1, 20000), 0.1))
    refused(lambda: build_dnlm(*sources, built, **SMALL), "noise files")
    (built / "build.json").unlink()
    refused(lambda: build_dnlm(*sources, built, **SMALL), "build.json")
    before.pop("build.json")
    assert content(built) == before


@pytest.mark.law
def test_one_noise_file_is_split_in_time(tmp_path, sources):
    noise = tmp_path / "one"
    ramp = np.linspace(0.01, 0.9, 3 * 16000)[None] * np.sign(np.sin(np.arange(48000) * 3.0))
    save(noise / "a.wav", ramp)
    out = build_dnlm(sources[0], noise, tmp_path / "out", **SMALL)

    def growth(split):
        """The noise's level rises over the file: after normalising, its slope tells the place."""
        waves = [read_audio(path)[0][0] for path in (out / split).glob("*/noise.wav")]
        return [float(wave[:100].abs().mean() / wave[-100:].abs().mean()) for wave in waves]

    assert max(growth("train")) < min(growth("valid"))


def test_test_split_and_named_valid_speakers(tmp_path, sources):
    more = {"test": 2, "test_seconds": 1.0, "valid_speakers": ["spk2"]}
    out = build_dnlm(*sources, tmp_path / "out", **SMALL, **more)
    assert speakers(out, "valid") == speakers(out, "test") == {"spk2"}
    assert "spk2" not in speakers(out, "train")
    assert read_info(out / "test" / "sample_00001" / "vocals.wav").frames == 16000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("train", 0), ("valid", -1), ("seconds", 0.0), ("sample_rate", 1)),
        *(("snr", (0.0, -30.0)), ("distance", (0.0, 20.0))),
        *(("seconds", 2.5), ("valid_speakers", ["nobody"]), ("valid_speakers", [])),
    ],
)
def test_options_out_of_their_limits_are_named(tmp_path, sources, key, value):
    refused(lambda: build_dnlm(*sources, tmp_path / "out", **SMALL | {key: value}), key)
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit(tmp_path, sources):
    speech, noise = sources
    (tmp_path / "empty").mkdir()
    save(tmp_path / "lonely" / "a.wav", noise_wave(0, 16000))
    for *folders, message in (
        (tmp_path / "none", noise, "none does not exist"),
        (tmp_path / "empty", noise, "empty (0) for train"),
        (speech, tmp_path / "empty", "empty (0) for train"),
        (tmp_path / "lonely", noise, "lonely (1) for valid"),
        (tmp_path, noise, "noise_dir"),
    ):
        refused(lambda f=folders: build_dnlm(*f, tmp_path / "out", **SMALL), message)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_source_is_named_from_any_process(tmp_path, sources, processes):
    for path in sources[0].rglob("*.*"):
        save(path, torch.zeros(1, 16000))
    out = tmp_path / "out"
    refused(lambda: build_dnlm(*sources, out, **SMALL, processes=processes), "silent", sources[0])
    assert not list(out.rglob("*.tmp"))


def test_multichannel_sources_become_mono_and_short_speech_is_padded(tmp_path):
    speech, noise = tmp_path / "speech", tmp_path / "noise"
    for name in ("a.wav", "b.wav"):
        save(speech / name, noise_wave(0, 3000, channels=2))
        save(noise / name, noise_wave(1, 20000, channels=2))
    out = build_dnlm(speech, noise, tmp_path / "out", **SMALL)
    vocals, _ = read_audio(out / "train" / "sample_00000" / "vocals.wav")
    assert vocals.shape == (1, 8000)
    assert not vocals[0, 3000:].any()


def test_a_subset_arrives_whole_and_is_kept_or_a_way_out_is_named(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    def fetch(root, url, download):
        (root / "LibriSpeech" / url / "19").mkdir(parents=True)  # a stopped run's tree is gone

    (tmp_path / ".librispeech-dev-clean" / "LibriSpeech" / "dev-clean" / "19").mkdir(parents=True)
    for network in (fetch, fail):  # the second time it is there
        monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", network)
        assert (download_librispeech(tmp_path, "dev-clean") / "19").is_dir()
        assert [path.name for path in tmp_path.iterdir()] == ["LibriSpeech"]
    refused(lambda: download_librispeech(tmp_path), "check the network", "diffbuf data demo")
    refused(lambda: download_librispeech(tmp_path, "train-clean"), "train-clean-100")
