"""What a config refuses, and what it says then."""

from pathlib import Path

import pytest
import yaml

from diffbuf_lib import load_config
from diffbuf_lib.config import Config, build_config, describe_keys
from diffbuf_lib.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_comes_back_from_its_own_yaml(path, tmp_path):
    cfg = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(cfg.to_yaml())
    assert load_config(copy) == cfg


def test_the_paper_config_says_what_the_paper_does():
    cfg = load_config(CONFIGS / "9_Diffusion_Buffer_BBED.yaml")
    assert (cfg.audio.sample_rate, cfg.audio.chunk_size) == (16000, 16000)
    assert (cfg.audio.stft.n_fft, cfg.audio.stft.hop_length) == (510, 256)
    buffer = cfg.diffusion_buffer
    assert (buffer.buffer_size, buffer.t_eps, buffer.t_max) == (20, 0.03, 0.8)
    training = cfg.training
    assert (training.optimizer, training.lr, training.batch_size) == ("adam", 1e-4, 32)
    assert (training.ema_momentum, training.num_epochs, training.use_amp) == (0.999, 250, True)
    assert cfg.num_frames == 63
    assert cfg.leading_zero_samples == 62 * 256


def test_overrides_win_in_order_and_leave_the_original():
    cfg = load_config(CONFIGS / "debug.yaml", ["training.lr=1", "training.lr=2e-3"])
    assert cfg.training.lr == 2e-3
    assert cfg.override("training.lr=1").training.lr == 1
    assert cfg.training.lr == 2e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batchsize=2", "did you mean training.batch_size"),
        ("sde.diffusion.teta=0.1", "did you mean sde.diffusion.theta"),
        ("sde.diffusion.gamma=1", "with sde.type bbed the names are k, c, theta"),
        ("lr=1", "did you mean training.lr"),
        ("sde={type: ouve, diffusion: {gama: 1}}", "did you mean sde.diffusion.gamma"),
        ("audio.sftf.hop=1", "did you mean audio.stft"),
        ("nonsense=1", "the names are plugins, audio"),
        ("diffusion_buffer.buffer_size=80", "80 is larger than the 63 STFT frames of a 16000-"),
        ("diffusion_buffer.buffer_size=0", r"Buffer size must be at least 1\."),
        ("diffusion_buffer.num_frames=7", "buffer_size 8 is too large for .*num_frames 7"),
        ("diffusion_buffer.t_eps=0", r"diffusion_buffer.t_eps = 0: .* greater than 0"),
        ("diffusion_buffer.t_max=1", "sigma is 0"),
        ("diffusion_buffer.t_max=0.01", "t_eps 0.03 is too large for .*t_max 0.01"),
        ("sde.diffusion.c=0.08", "c = sqrt"),
        ("sde.type=gauss", "sde.type = 'gauss' .* bbed or ouve"),
        ("audio.chunk_size=abc", "audio.chunk_size = 'abc'"),
        ("audio.stft.hop_length=600", "hop_length 600 is too large for .*win_length 510"),
        ("training.lr=.nan", "training.lr = nan"),
        ("training.metric_for_scheduler=pesq", "add it to training.metrics"),
        ("training.snr_weight=1", "set training.loss to data_prediction"),
        ("plugins=5", "plugins = 5"),
        ("no equals sign", "not of the form key.path=value"),
        ("training.lr=[", "not YAML"),
    ],
)
def test_bad_values_are_refused_in_one_line_that_helps(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(CONFIGS / "debug.yaml", [override])
    assert "\n" not in str(caught.value)


def test_a_chunk_without_a_frame():
    with pytest.raises(ConfigError, match=r"Buffer size must be at least 1\. A 500-sample chunk"):
        build_config({}, ["audio.stft.center=false", "audio.chunk_size=500"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not plain YAML"),
        (b"\xff\xfe\x00", "not plain YAML"),
        (b"just words", "holds 'just words'"),
        (b"a: !!python/object/apply:os.system ['true']", "not plain YAML"),
        (b"", "holds None"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    for missing in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="--config_path"):
            load_config(missing)


def test_every_key_is_described():
    keys = {key: description for key, _, description in describe_keys()}
    assert {"audio.stft.hop_length", "sde.diffusion.theta", "sde.diffusion.gamma"} <= set(keys)
    assert all(keys.values())


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        Config().training.lr = 1.0
    assert yaml.safe_load(Config().to_yaml())["training"]["lr"] == 1e-4
