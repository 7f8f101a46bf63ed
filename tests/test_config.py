"""What a config takes, and what it refuses."""

from pathlib import Path

import pytest

from diffbuf_lib import load_config
from diffbuf_lib.errors import ConfigError
from tests.conftest import refused

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_comes_back_from_its_own_yaml(path, tmp_path):
    cfg = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(cfg.to_yaml())
    assert load_config(copy) == cfg


def test_the_paper_config_says_what_the_paper_does():
    cfg = load_config(CONFIGS / "9_Diffusion_Buffer_BBED.yaml")
    audio, buffer, training = cfg.audio, cfg.diffusion_buffer, cfg.training
    assert (audio.sample_rate, audio.stft.n_fft, audio.stft.hop_length) == (16000, 510, 256)
    assert (buffer.buffer_size, buffer.t_eps, buffer.t_max) == (20, 0.03, 0.8)
    assert (training.optimizer, training.lr, training.batch_size) == ("adam", 1e-4, 32)
    assert (training.ema_momentum, training.num_epochs) == (0.999, 250)
    assert (cfg.num_frames, cfg.leading_zero_samples) == (63, 62 * 256)


def test_overrides_win_in_order_and_leave_the_original():
    cfg = load_config(CONFIGS / "debug.yaml", ["training.lr=1", "training.lr=2e-3"])
    assert cfg.override("training.lr=1").training.lr == 1
    assert cfg.training.lr == 2e-3
    with pytest.raises(ValueError, match="frozen"):
        cfg.training.lr = 1.0


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.batchsize=2", "training.batch_size?"),
        ("lr=1", "training.lr?"),  # of another section
        ("sde.diffusion.gamma=1", "c, theta"),  # is of another SDE
        ("sde={type: ouve, diffusion: {gama: 1}}", "sde.diffusion.gamma?"),
        ("nonsense=1", "plugins, audio"),
        (r'training.metric_for_scheduler="\ud800\udc00"', r"\ud800\udc00 is not in ['si_sdr']"),
        ("diffusion_buffer.buffer_size=80", "63 STFT frames"),
        ("diffusion_buffer.buffer_size=0", "Buffer size must be at least 1."),
        ("diffusion_buffer.num_frames=7", "num_frames 7"),
        ("diffusion_buffer.t_eps=0", "diffusion_buffer.t_eps = 0"),
        ("diffusion_buffer.t_max=1", "sigma is 0"),
        ("diffusion_buffer.t_max=0.01", "t_max 0.01"),
        ("audio={chunk_size: 500, stft: {center: false}}", "audio.chunk_size"),  # no frame
        ("sde.diffusion.c=0.08", "c = sqrt"),
        ("sde.type=gauss", "bbed or ouve"),
        ("audio.chunk_size=abc", "audio.chunk_size = 'abc'"),
        ("audio.stft.hop_length=600", "win_length 510"),
        ("training.lr=.nan", "training.lr = nan"),
        ("training.metric_for_scheduler=pesq", "training.metrics"),
        ("training.snr_weight=1", "training.loss"),
        ("plugins=5", "plugins = 5"),
        ("no equals sign", "key.path=value"),
        ("training.lr=[", "YAML"),
    ],
)
def test_bad_values_are_refused_in_one_line_that_helps(override, part):
    refused(lambda: load_config(CONFIGS / "debug.yaml", [override]), part)


@pytest.mark.parametrize(
    "content", [b"a: [", b"\xff\xfe\x00", b"words", b"a: !!python/object/apply:os.system ['true']"]
)
def test_files_that_are_no_config(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    for bad in (path, tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(bad)):
            load_config(bad)
