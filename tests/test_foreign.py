"""Configs of another project: every key is taken, left out by name, or told as unknown."""

import re

import pytest
import yaml

from diffbuf_lib import load_config
from diffbuf_lib.config import describe_keys
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.foreign import TABLE, translate

THEIRS = """
audio: {chunk_size: 4000, sample_rate: 16000, hop_length: 64, num_channels: 1,
        stft: {n_fft: 126, win_length: 126, window: hann_periodic}}
model: {name: diffusion_buffer_bbed, base_channels: 64, channels: 32, down_blocks: 3}
diffusion_buffer: {buffer_size: 5, t_max: 0.8}
sde: {type: bbed, reverse_start: 0.7, diffusion: {c: 0.08, k: 2.6}}
training:
  num_epochs: 3
  num_steps: 4
  grad_clip: 0
  instruments: vocals
  novel_key: 7
  early_stop: {enabled: true, patience: 5, metric: si-sdr}
inference: {num_overlap: 4}
"""
KNOWN = {key for key, *_ in describe_keys()}


def test_their_file_is_taken_as_it_is_and_told_once(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(THEIRS)
    with pytest.warns(UserWarning, match="Separation") as told:
        cfg = load_config(path, ["training.lr=0.5"])
    assert len(told) == 1
    for key in ("training.novel_key", "inference.num_overlap", "sde.diffusion.theta", "0.7"):
        assert key in str(told[0].message)
    assert (cfg.model.name, cfg.model.base_channels) == ("ncsnpp", 32)
    assert cfg.model.channel_multipliers == (1, 2, 2)
    assert (cfg.audio.stft.hop_length, cfg.audio.stft.window) == (64, "hann")
    training = cfg.training
    assert (training.grad_clip, training.num_steps, training.early_stopping) == (None, 12, 5)
    assert (training.metric_for_scheduler, training.lr) == ("si_sdr", 0.5)
    path.write_text(THEIRS.replace("down_blocks: 3", "down_blocks: many"))
    with (
        pytest.warns(UserWarning, match="Separation"),
        pytest.raises(ConfigError, match="channel_multipliers"),
    ):
        load_config(path)


def test_every_key_is_taken_or_left_out_by_name():
    _, table = translate(yaml.safe_load(THEIRS), KNOWN)
    same = int(re.search(r"(\d+) keys are the same", table)[1])
    left = re.findall(r"left out \(.*?\): (.*)", table)
    looks = table.count("look at model.base_channels")
    # Every one of the 26 keys, once.
    assert same + table.count("->") + sum(len(row.split(", ")) for row in left) + looks == 26
    assert table.count("training.novel_key: 7") == 1
    assert {row.ours for row in TABLE.values() if row.ours} <= KNOWN
