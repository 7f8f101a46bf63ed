"""Costs are of what was measured; a launch command is what train.py and torchrun understand."""

import shlex
from pathlib import Path

import pytest
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.data import open_dataset
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.notebook import launch, plots, scaling
from diffbuf_lib.notebook.scaling import ReadingCost, StepCost
from diffbuf_lib.training import train
from diffbuf_lib.training.folder import ResultsFolder, read_history
from tests.conftest import make_model
from tests.notebook.folders import make_paired_folder
from tests.training.helpers import Clips, config

PATHS = ("configs/a b.yaml", "results/run", "data/train")


# Costs.


def test_step_costs_are_losses_of_the_batches_and_change_nothing():
    cfg = config()
    model = make_model(cfg)
    before = [p.detach().clone() for p in model.parameters()]
    one, nine = scaling.step_costs(model, Clips(), [1, 9], repeats=1)
    assert (one.batch_size, nine.batch_size) == (1, 9)
    mix, target = (wave[None] for wave in Clips()[0])
    loss = model(mix, target, torch.Generator().manual_seed(cfg.training.seed))
    assert one.loss == pytest.approx(loss.item())
    assert 5 * one.saved_bytes < nine.saved_bytes < 10 * one.saved_bytes
    assert nine.clips_per_second == pytest.approx(9 / nine.seconds)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bfloat16_is_close_but_not_equal_and_keeps_less():
    model = make_model(config("model.base_channels=16", "model.num_layers=3"))
    (plain,) = scaling.step_costs(model, Clips(), [2], repeats=0)
    (mixed,) = scaling.step_costs(model, Clips(), [2], precision="bfloat16", repeats=0)
    assert mixed.loss != plain.loss
    assert mixed.loss == pytest.approx(plain.loss, rel=0.02)
    assert mixed.saved_bytes < 0.75 * plain.saved_bytes


def test_reading_costs_tell_equal_batches_from_others():
    plan = scaling.plan_of(config(), 7)
    here, there = scaling.reading_costs(Clips(), plan, [0, 1])
    assert (here.workers, there.workers) == (0, 1)
    assert here.digest == there.digest
    (other,) = scaling.reading_costs(Clips(seed=1), plan, [0])
    assert other.digest != here.digest
    (fewer,) = scaling.reading_costs(Clips(), plan, [0], rounds=2)
    assert fewer.digest != here.digest


def test_hours_of_a_run():
    cfg = config("training.batch_size=4", "training.accumulation_steps=2")
    plan = scaling.plan_of(cfg, 100, processes=2)
    assert plan.steps == 6, "12 rounds of 8 clips, two rounds a step"
    assert scaling.run_hours(plan, 50, 12.0) == pytest.approx(50 * 6 * 12 / 3600)


def test_small_overrides_fit_any_config():
    for tree in ({}, {"sde": {"type": "ouve"}}, {"training": {"loss": "data_prediction"}}):
        assert build_config(tree, scaling.SMALL).model.base_channels == 8


def costs():
    return [
        StepCost(size, precision, 0.1 * size, size * 2**20, 1.0, 1.0)
        for precision in ("float32", "bfloat16")
        for size in (1, 4)
    ]


def test_cost_table_has_a_line_a_cost():
    lines = scaling.cost_table(costs()).splitlines()
    assert len(lines) == 5
    assert lines[2].split() == ["4", "float32", "400.0", "10.0", "4.0", "1.00000"]


def test_step_costs_are_drawn_with_units():
    seconds, speed, memory = plots.step_costs(costs()).axes
    for axes, expected in ((seconds, [100, 400]), (speed, [10, 10]), (memory, [1, 4])):
        assert [line.get_label() for line in axes.get_lines()] == ["float32", "bfloat16"]
        for line in axes.get_lines():
            assert list(line.get_xdata()) == [1, 4]
            assert list(line.get_ydata()) == pytest.approx(expected)
    assert seconds.get_ylabel().endswith("(ms)")
    assert memory.get_ylabel().endswith("(MiB)")


def test_reading_costs_are_drawn_beside_what_is_needed():
    rows = [ReadingCost(0, 0.01, 200.0, "a"), ReadingCost(2, 0.5, 100.0, "a")]
    speed, start = plots.reading_costs(rows, needed=150.0).axes
    assert [bar.get_height() for bar in speed.patches] == [200.0, 100.0]
    assert [bar.get_height() for bar in start.patches] == [10.0, 500.0]
    assert [label.get_text() for label in speed.get_xticklabels()] == ["0", "2"]
    assert speed.get_lines()[0].get_ydata()[0] == 150.0


# The command.


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, ["python", "train.py"]),
        ({"processes": 4}, ["torchrun", "--standalone", "--nproc_per_node", "4", "train.py"]),
        (
            {"processes": 4, "nodes": 2, "host": "gpu1"},
            ["torchrun", "--nnodes", "2", "--nproc_per_node", "4", "--rdzv_backend", "c10d",
             "--rdzv_endpoint", "gpu1:29500", "train.py"],
        ),
    ],
)  # fmt: skip
def test_command_means_what_was_asked_for(options, start):
    command = launch.launch_command(
        *PATHS, "data/valid", dataset_type=2, overrides=["training.batch_size=8", "sde.type=ouve"],
        flags=["--resume"], **options,
    )  # fmt: skip
    assert command[: len(start)] == start
    parsed = launch.parse_command(command)
    assert [str(parsed[f"{name}_path"]) for name in ("config", "results", "data", "valid")] == [
        *(str(Path(path)) for path in PATHS), str(Path("data/valid")),
    ]  # fmt: skip
    assert parsed["dataset_type"] == 2
    assert parsed["overrides"] == ("training.batch_size=8", "sde.type=ouve")
    assert parsed["resume"] is True


def test_torchrun_understands_its_part():
    from torch.distributed.run import get_args_parser

    for options in ({"processes": 3}, {"processes": 3, "nodes": 2, "host": "gpu1:1234"}):
        command = launch.launch_command(*PATHS, **options)
        parsed = get_args_parser().parse_args(command[1:])
        assert parsed.training_script == "train.py"
        assert parsed.nproc_per_node == "3"
    assert (parsed.nnodes, parsed.rdzv_endpoint) == ("2", "gpu1:1234")


def test_shell_line_is_the_command():
    command = launch.launch_command(*PATHS, processes=2, overrides=["model={name: conv}"])
    line = launch.shell_line(command)
    assert shlex.split(line.replace("\\\n", "")) == command
    assert line.splitlines()[0] == "torchrun --standalone --nproc_per_node 2 \\"
    assert "'configs/a b.yaml'" in line


@pytest.mark.parametrize("options", [{"processes": 0}, {"nodes": 0}, {"nodes": 2}])
def test_impossible_launches_are_refused(options):
    with pytest.raises(ConfigError):
        launch.launch_command(*PATHS, **options)


@pytest.mark.parametrize("flags", [["--no_such_flag"], ["--dataset_type", "one"]])
def test_what_train_would_refuse_is_refused(flags):
    with pytest.raises(ConfigError, match="refuses"):
        launch.parse_command(launch.launch_command(*PATHS, flags=flags))


def test_a_command_runs_and_trains_what_train_does(tmp_path):
    data = make_paired_folder(tmp_path / "own", train=4, valid=1)
    cfg = config("training.num_steps=2", "training.batch_size=2")
    (tmp_path / "tiny.yaml").write_text(cfg.to_yaml())
    command = launch.launch_command(
        "tiny.yaml", tmp_path / "run", data / "train", dataset_type=2, flags=["--skip_doctor"]
    )
    assert str(tmp_path / "run" / "model") in launch.run_on_cpu(command, tmp_path)
    history = [line["loss"] for line in read_history(ResultsFolder(tmp_path / "run").history)]
    clips = open_dataset(2, data / "train", cfg, training=True)
    losses = [record.loss for record in train(cfg, clips, None, tmp_path / "own run", device="cpu")]
    assert history == pytest.approx(losses, rel=1e-5)


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(ConfigError, match="exit status 3: out of luck"):
        launch.run_on_cpu(["python", "-c", "print('out of luck'); raise SystemExit(3)"], tmp_path)
