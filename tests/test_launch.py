"""Jobs for schedulers: what is asked for stands in them, and a shell and YAML can read them."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from diffbuf_lib.errors import ConfigError
from diffbuf_lib.launch import submit, write_job
from tests.conftest import call

CONFIG = "configs/demo.yaml"


def words(job):
    """The command of a job's last stage, as a shell splits it."""
    text = job.read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if "torch.distributed.run" in line)
    return shlex.split(line)


@pytest.mark.parametrize("kind", ["slurm", "skypilot", "torchrun"])
def test_a_job_says_what_was_asked_for(kind, tmp_path):
    job = write_job(
        kind, CONFIG, "s3://bucket/a folder", tmp_path / "my run", nodes="2", gpus=4,
        env=["NCCL_DEBUG=INFO", "QUOTED=it's $HOME"], time="1-00:00:00",
        options=["--partition=gpu"] * (kind == "slurm"), overrides=["training.lr=1e-3"],
    )  # fmt: skip
    found = words(job)
    begin = found.index("train")
    assert found[begin - 2 : begin + 2] == ["-m", "diffbuf_lib.cli", "train", "--resume_if_any"]
    for flag, value in (("data_path", "s3://bucket/a folder"), ("set", "training.lr=1e-3")):
        assert found[found.index(f"--{flag}") + 1] == value
    assert "--nproc-per-node=4" in found
    if kind == "skypilot":
        task = yaml.safe_load(job.read_text())
        assert task["envs"]["QUOTED"] == "it's $HOME"
        assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:4")
        return
    subprocess.run(["bash", "-n", str(job)], check=True)
    script = 'eval "$(grep ^export "$1")"; printf %s "$QUOTED"'
    shell = subprocess.run(["bash", "-c", script, "_", job], capture_output=True, text=True)
    assert shell.stdout == "it's $HOME"
    assert "--nnodes=2" in found
    if kind == "slurm":
        lines = {line.removeprefix("#SBATCH ") for line in job.read_text().splitlines()}
        wanted = {"--nodes=2", "--gpus-per-node=4", "--time=1-00:00:00", "--requeue",
                  "--signal=B:USR1@120", "--open-mode=append", "--partition=gpu"}  # fmt: skip
        assert wanted <= lines


def test_skypilot_takes_its_job(tmp_path):
    sky = pytest.importorskip("sky")
    job = write_job("skypilot", CONFIG, "s3://bucket/train", tmp_path / "run", gpus=8)
    assert sky.Task.from_yaml(str(job)).num_nodes == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("slurm", {"nodes": "1:4"}),
        ("slurm", {"nodes": "2\n#SBATCH --uid=0"}),
        ("slurm", {"time": "tomorrow"}),
        ("skypilot", {"accelerator": "a b"}),
        ("torchrun", {"env": ["no equals sign"]}),
        ("torchrun", {"overrides": ["training.nonsense=1"]}),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, tmp_path):
    with pytest.raises(ConfigError):
        write_job(kind, CONFIG, "data", tmp_path, **options)


def test_command(tmp_path, monkeypatch, capsys):
    args = ["launch", "torchrun", CONFIG, "--data_path", "a", "s3://b", "--results_path", tmp_path,
            "--nodes", "1:4", "--gpus", "0", "--train=--skip_doctor --max_steps 3",
            "--options=--a", "--set", "training.lr=1e-3", "training.seed=2"]  # fmt: skip
    status, out, _ = call(monkeypatch, capsys, *args)
    assert (status, out.strip()) == (0, str(tmp_path / "torchrun.sh"))
    found = words(tmp_path / "torchrun.sh")
    data = found.index("--data_path")
    assert found[data + 1 : data + 3] == [str(Path("a").resolve()), "s3://b"]
    end = found.index(">>")
    assert found[end - 5 : end] == ["3", "--set", "training.lr=1e-3", "--set", "training.seed=2"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch"):
        submit("slurm", tmp_path / "torchrun.sh")
