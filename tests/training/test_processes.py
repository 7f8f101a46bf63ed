"""Runs on any number of processes, and signals to them: the same run, and nothing of it lost."""

import os
import pty
import random
import signal
import socket
import subprocess
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing import get_context

import pytest
import torch

from diffbuf_lib import cli
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.launch import write_job
from diffbuf_lib.training.folder import read_history
from diffbuf_lib.training.run import make_plan
from tests.training.helpers import Clips, Hooked, config, fit, history, last, write_clips

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
STATUS = 130


def start(count, function, *args):
    """Fork processes that torch.distributed takes for those of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank):
        world = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        if count > 1:
            os.environ.update({name: str(value) for name, value in world.items()})
        status = 1
        try:
            function(*args)
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    processes = [get_context("fork").Process(target=begin, args=(r,)) for r in range(count)]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in processes]


def steps_of(folder):
    """How many steps a run has made, none of them twice."""
    made = [line["step"] for line in history(folder) if "loss" in line]
    assert made == list(range(1, len(made) + 1))
    return len(made)


def steps_made(folder):
    """How many steps a run has made that may be writing just now."""
    return sum("loss" in line for line in read_history(folder / "history.jsonl"))


def assert_same_numbers(one, other):
    lines = [[line for line in history(path) if "changed" not in line] for path in (one, other)]
    for line, twin in zip(*lines, strict=True):
        assert line["step"] == twin["step"]
        if "loss" in line:
            assert line["loss"] == pytest.approx(twin["loss"], abs=1e-4)
        else:
            assert line["valid"] == pytest.approx(twin["valid"], rel=1e-3)


def train_part(folder, clips, steps, *overrides):
    torch.set_num_threads(1)
    cfg = config("training.num_epochs=3", *overrides)
    fit(cfg, folder, steps=steps, resume="auto", train_set=Clips(clips))


@pytest.mark.law
@pytest.mark.parametrize(
    ("clips", "whole", "parts"),
    [
        (7, ["batch_size=2"], [(2, ["batch_size=1"], 2), (1, ["batch_size=2"], 3),
                               (1, ["batch_size=1", "accumulation_steps=2"], 2),
                               (2, ["batch_size=1", "accumulation_steps=2"], None)]),
        # 11 clips in steps of 4, 4 and 2: of the last one, half the processes have nothing.
        (11, ["batch_size=2", "accumulation_steps=2"],
         [(1, ["batch_size=2", "accumulation_steps=2"], 1),
          (4, ["batch_size=2", "accumulation_steps=2"], 4),
          (2, ["batch_size=2", "accumulation_steps=2"], None)]),
        (9, ["global_batch=4"], [(4, ["global_batch=4"], 3), (1, ["global_batch=4"], None)]),
    ],
)  # fmt: skip
def test_a_run_is_its_global_batch(tmp_path, clips, whole, parts):
    whole = [f"training.{key}" for key in whole]
    train_part(tmp_path / "whole", clips, None, *whole)
    for processes, keys, steps in parts:
        overrides = [f"training.{key}" for key in keys]
        begun = start(processes, train_part, tmp_path / "parts", clips, steps, *overrides)
        assert finish(begun) == [0] * processes
    assert_same_numbers(tmp_path / "whole", tmp_path / "parts")
    a, b = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert b["processes"] == parts[-1][0]
    assert (a["step"], a["examples"]) == (b["step"], b["examples"])
    for name in ("model", "ema"):
        torch.testing.assert_close(dict(a[name]), dict(b[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.law
def test_another_global_batch_or_lr_is_asked_for_and_written_down(tmp_path):
    fit(config(), tmp_path, steps=2)
    records = fit(config("training.lr=5e-4"), tmp_path, steps=1, resume=True)
    assert records[0].lr == pytest.approx(5e-4)
    fit(config("training.lr=5e-4", "training.batch_size=3"), tmp_path, steps=1, resume=True)
    changes = [line for line in history(tmp_path) if "changed" in line]
    assert changes == [
        {"step": 2, "changed": {"training.lr": [1e-3, 5e-4]}},
        {"step": 3, "changed": {"training.batch_size": [2, 3], "global batch": [2, 3]}},
    ]
    training, state = config("training.batch_size=3").training, {**last(tmp_path), "changed": {}}
    with pytest.raises(ConfigError, match="global batch of 3"):
        make_plan(training, 7, 2, state)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command that trains on data on disk, and what it comes to."""
    root = tmp_path_factory.mktemp("run")
    data, cfg = write_clips(root / "data"), root / "config.yaml"
    cfg.write_text(config("training.num_epochs=12").to_yaml())
    args = ["train", "--config_path", cfg, "--data_path", data, "--valid_path", data,
            "--skip_doctor", "--resume_if_any", "--set", "training.num_workers=1"]  # fmt: skip
    args = [str(arg) for arg in args]
    assert finish(start(1, run_command, args, root / "whole")) == [0]
    return args, root / "whole"


def run_command(args, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # no CUDA device
    folder.mkdir(exist_ok=True)
    rank = os.environ.get("RANK", "0")
    with open(folder / f"log{rank}", "a") as log, redirect_stdout(log), redirect_stderr(log):
        cli.main([*args, "--results_path", str(folder)])


def wait_for(folder, steps, processes):
    while steps_made(folder) < steps and all(p.exitcode is None for p in processes):
        time.sleep(0.002)


def assert_nothing_is_lost(folder, log):
    """Every step of the history is saved, and a stopped process's message tells the last one."""
    saved = last(folder)["step"]
    assert steps_of(folder) == saved
    if "stopped; " in log:
        assert f"saved at step {saved};" in log


@pytest.mark.law
@pytest.mark.parametrize("tries", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [1, 2])
def test_storms_of_signals(command, tmp_path, tries, processes):
    """One signal, or five within a second, of any kind, to one process or all, at any moment."""
    args, whole = command
    args = [*args, "training.global_batch=2"] if processes > 1 else args
    rng, total = random.Random(10 * tries + processes), steps_of(whole)
    folder, stops = tmp_path / "run0", 0
    for attempt in range(10 * tries):
        done, log = steps_made(folder), folder / "log0"
        before = log.stat().st_size if log.exists() else 0
        begun = start(processes, run_command, args, folder)
        wait_for(folder, done + rng.randrange(1, total // 2), begun)
        time.sleep(rng.uniform(0, 0.02))
        for _ in range(rng.choice([1, 5])):
            for process in begun if rng.random() < 0.5 else begun[:1]:
                if process.exitcode is None:
                    os.kill(process.pid, rng.choice(SIGNALS))
            time.sleep(rng.uniform(0, 0.2))
        statuses = finish(begun)
        told = log.read_bytes()[before:].decode()
        assert set(statuses) in ({0}, {STATUS}, {0, STATUS}), told
        assert_nothing_is_lost(folder, told)
        stops += STATUS in statuses
        state = last(folder)
        if state["step"] == total and state["pending"] is None:  # else it still has to validate
            assert_same_numbers(whole, folder)
            folder = tmp_path / f"run{attempt + 1}"
        if stops == tries:
            return
    raise AssertionError("no signal came in time")


@pytest.mark.law
def test_only_a_persons_second_ctrl_c_stops_at_once(tmp_path):
    """At a terminal, which a pseudo-terminal is; in the middle of step 2, which is not made."""
    pid, _ = pty.fork()
    if pid == 0:

        def press_twice(mix):
            if steps_made(tmp_path) == 1:
                for _ in range(2):
                    signal.raise_signal(signal.SIGINT)

        status = 1
        try:
            fit(config(), tmp_path, model=Hooked(config(), before=press_twice))
        except KeyboardInterrupt:
            status = STATUS
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == STATUS
    assert steps_of(tmp_path) == 1


@pytest.mark.law
def test_a_process_that_dies_ends_the_others_with_a_message(command, tmp_path):
    """As a node that dies: what is lost are the steps since the last checkpoint."""
    args, whole = command
    args, folder = [*args, "training.global_batch=2", "training.checkpoint_every=2"], tmp_path / "r"
    begun = start(2, run_command, args, folder)
    wait_for(folder, 5, begun)
    begun[1].kill()
    assert finish(begun) == [2, -signal.SIGKILL]
    assert "error: " in (folder / "log0").read_text()
    assert finish(start(1, run_command, args, folder)) == [0]
    assert_same_numbers(whole, folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_two_machines_one_dies_and_the_other_goes_on(command, tmp_path):
    """Two agents of torchrun, as `diffbuf launch torchrun --nodes 1:2` starts them."""
    folder, data = tmp_path / "run", command[1].parent / "data"
    endless = [
        f"training.{x}" for x in ("num_epochs=4000", "global_batch=2", "checkpoint_every=10")
    ]
    job = write_job(
        "torchrun", data.parent / "config.yaml", data, folder, nodes="1:2", gpus=0,
        env=["OMP_NUM_THREADS=1"], train=["--skip_doctor"], overrides=endless,
    )  # fmt: skip
    agents, workers = [], [[], []]
    try:
        for _ in range(2):
            agents.append(subprocess.Popen(["bash", str(job)], start_new_session=True))
            time.sleep(3)  # the first one keeps their store
        wait_until(lambda: steps_made(folder) > 30)
        killed = steps_made(folder)
        workers = [workers_of(agent) for agent in agents]
        for pid in [*workers[1], agents[1].pid]:
            os.kill(pid, signal.SIGKILL)
        gone = "another process of the run has gone"
        wait_until(lambda: gone in (folder / "job.log").read_text())
        wait_until(lambda: steps_made(folder) > killed + 30)
    finally:
        for pid in [*workers_of(agents[0]), *workers[1], *(agent.pid for agent in agents)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for agent in agents:
            agent.wait()


def workers_of(agent):
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_until(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
