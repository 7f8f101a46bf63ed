"""The command line as a newcomer types it, and what it says when something is wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from diffbuf_lib import commands, load_config
from tests.conftest import call
from tests.evaluation.conftest import write_clip
from tests.test_foreign import THEIRS

ROOT = Path(__file__).parents[1]
SMALL = [
    "--set", "model.name=conv", "model.base_channels=4", "model.num_layers=1",
    "training.batch_size=2", "training.valid_clips=1", "--set", "diffusion_buffer.buffer_size=3",
    "diffusion_buffer.num_frames=4",
]  # fmt: skip
NO_TORCH = """
import sys
from diffbuf_lib import cli, commands
helped = ["", "data", "demo_model", *commands.COMMANDS]
calls = [([*name.split(), "--help"], 0) for name in helped]
calls += [(["config"], 0), (["config", "configs/debug.yaml"], 0)]
calls += [(["train", "--wrong", "1"], 2), (["nonsense"], 2)]
for args, expected in calls:
    status = 0
    try:
        cli.main(args)
    except SystemExit as stop:
        status = stop.code
    assert status == expected, (args, status)
    heavy = {"torch", "scipy", "pandas", "matplotlib"} & set(sys.modules)
    assert not heavy, (args, heavy)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small DN-LM splits and the same as clean/noisy folders."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, i in [*(("train", i) for i in range(4)), ("valid", 0)]:
        clean, noise = 0.1 * rng.standard_normal((2, 16000))
        write_clip(root / split, i, clean, clean + noise)
        for name, wave in (("clean", clean), ("noisy", clean + noise)):
            (root / f"pairs-{split}" / name).mkdir(parents=True, exist_ok=True)
            soundfile.write(root / f"pairs-{split}" / name / f"{i}.wav", wave, 16000)
    return root


def run(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_the_command_and_config_of_another_project(data, tmp_path, monkeypatch, capsys):
    """Their flags, two folders as one, a validation before the first step."""
    config, results = tmp_path / "theirs.yaml", tmp_path / "run"
    config.write_text(THEIRS)
    (data / "train" / "metadata.json").write_text('{"train": [{"id": 0, "input_snr": -3.0}]}')
    command = [
        "train.py", "--model_type", "diffusion_buffer", "--config_path", config,
        "--results_path", results, "--data_path", data / "train", data / "valid",
        "--valid_path", data / "valid", "--dataset_type", "1", "--device_ids", "0",
        "--num_workers", "0", "--pin_memory", "--pre_valid", "--wandb_key", "", "--skip_doctor",
        "--max_steps", "1",
    ]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training.instruments") == 1
    assert "5 training clips" in done.stdout
    lines = [json.loads(line) for line in (results / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1]
    assert lines[0]["valid"]["loss"] > 0
    for flag in ("--train_lora", "--use_mse_loss"):
        refused = run(*command, flag)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert flag in refused.stderr
    ours = tmp_path / "ours.yaml"
    assert call(monkeypatch, capsys, "config", "import", config, "-o", ours)[0] == 0
    assert load_config(ours).model.channel_multipliers == (1, 2, 2)


def test_train_resume_enhance_and_evaluate(data, tmp_path, monkeypatch, capsys):
    """The command of the README, to the letter, on small data, and what follows it."""
    results = tmp_path / "run"
    command = [
        "train.py", "--model_type", "diffusion_buffer",
        "--config_path", "configs/9_Diffusion_Buffer_BBED.yaml",
        "--results_path", results, "--data_path", data / "train",
        "--valid_path", data / "valid", "--dataset_type", "1", "--device_ids", "0",
        "--num_workers", "0", "--metrics", "si_sdr", "sdr", "--metric_for_scheduler", "si_sdr",
        *SMALL, "--seed", "1", "--max_steps",
    ]  # fmt: skip
    done = run(*command, 3)
    assert done.returncode == 0, done.stderr
    (warned,) = (line for line in done.stderr.splitlines() if "warning" in line)
    assert "CPU" in warned
    assert "si_sdr" in done.stdout
    again = run(*command, 3)
    assert again.returncode == 2
    assert "--resume" in again.stderr.splitlines()[-1]
    more = run(*command, 4, "--resume")
    assert more.returncode == 0, more.stderr
    steps = [line for line in (results / "history.jsonl").read_text().splitlines() if "lr" in line]
    assert len(steps) == 4

    model, clean = results / "model", tmp_path / "clean.wav"
    noisy = data / "valid" / "sample_00000" / "mixture.wav"
    enhanced = call(monkeypatch, capsys, "enhance", noisy, "-o", clean, "--model", model)
    assert enhanced == (0, f"{clean}\n", "")
    assert soundfile.info(clean).frames == 16000
    status, out, _ = call(
        monkeypatch, capsys, "evaluate", "--model", model, "--data_path", data / "pairs-valid",
        "--dataset_type", 2, "--metrics", "si_sdr", "estoi", "--results_path", tmp_path / "e",
        "--seconds", 0.9, "--processes", 1,
    )  # fmt: skip
    assert (status, "ESTOI" in out) == (0, True)
    assert len((tmp_path / "e" / "scores.csv").read_text().splitlines()) == 3


def test_help_configs_and_wrong_flags_come_without_torch():
    done = run("-c", NO_TORCH)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "flags",
    ["--set {0} {1} {2}", "{2} --set {0} --set {1}", "{2} --set={0} {1}"],
)
@pytest.mark.law
def test_config_prints_what_load_config_reads(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    flags = flags.format("training.lr=5", "training.batch_size=7", "configs/debug.yaml").split()
    _, out, _ = call(monkeypatch, capsys, "config", *flags)
    (tmp_path / "c.yaml").write_text(out)
    assert load_config(tmp_path / "c.yaml").training.lr == 5
    assert load_config(tmp_path / "c.yaml").training.batch_size == 7
    assert "diffusion_buffer.buffer_size = 20" in call(monkeypatch, capsys, "config")[1]


def test_data_build_makes_a_set(data, tmp_path, monkeypatch, capsys):
    status, _, _ = call(
        monkeypatch, capsys, "data", "build", "--speech_path", data / "train", "--noise_path",
        data / "valid", "--out_path", tmp_path, "--train", 2, "--valid", 1, "--processes", 1,
        "--test", 1, "--test_seconds", 0.5,
    )  # fmt: skip
    counts = [
        len(list((tmp_path / split).glob("sample_*"))) for split in ("train", "valid", "test")
    ]
    assert (status, counts) == (0, [2, 1, 1])


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    monkeypatch.setattr(commands.PrintConfig, "__call__", lambda self: signal.raise_signal(2))
    before = signal.signal(2, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert call(monkeypatch, capsys, "config")[::2] == (130, "\nstopped\n")
    finally:
        signal.signal(2, before)


def test_demo_model_needs_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "diffbuf_lib" / "commands.py"))
    status, _, err = call(monkeypatch, capsys, "demo-model")
    assert (status, err.count("\n"), "recipes/" in err) == (2, 1, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--set", "training.lrr=1"], "did you mean training.lr?"),
        (["train", "--dataset_type", "99"], "--dataset_type = 99"),
        (["train", "--data_path", "a"], "list all paths after one --data_path"),
        (["train", "--dataset_type", "2"], "--dataset_type 1"),
        (["train", "--device_ids", "0", "1"], "torchrun --nproc_per_node 2"),
        (["enhance", "a.wav", "-o", "b.wav", "--model", "nowhere"], "no model is there"),
        ([], "data demo"),
        (["trian"], "did you mean train?"),
    ],
)
def test_errors_are_one_line_with_status_2(args, message, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if args[:1] == ["train"]:
        args = [*args, "--results_path", tmp_path / "r", "--data_path", data / "train"]
        args += ["--config_path", "configs/debug.yaml"]
    status, _, err = call(monkeypatch, capsys, *args)
    assert (status, err[:7], err.count("\n")) == (2, "error: ", 1)
    assert message in err
    assert not (tmp_path / "r").exists()
