"""`make test-cluster`: a run that a real Slurm cuts, requeues and moves, from shards on a real S3.

As root on Debian: two nodes on loopback. A run of 400 steps is cut by its time limit on two nodes,
comes back by itself, is cut again, goes on on one node, and ends on two. Its history has no gap and
no repetition, and its losses are within 1e-4 of an unbroken run on one process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from benchmarks.s3 import serve_s3
from diffbuf_lib.data import pack_folder
from diffbuf_lib.launch import write_job
from tests.data.conftest import noise_wave, save
from tests.training.helpers import TREE

STEPS, CLIPS = 400, 40
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/ctld.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/ctld.log
SlurmdLogFile={state}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SelectType=select/cons_tres
KillWait=30
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[27001-27002] CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def shell(*command: str, check: bool = True) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


@contextmanager
def slurm(root: Path) -> Iterator[None]:
    """Install and start two nodes; stop them again."""
    if shutil.which("slurmctld") is None:
        shell("apt-get", "-qq", "update")
        shell("apt-get", "-qq", "-y", "install", "--no-install-recommends", "slurmctld", "slurmd",
              "slurm-client", "munge")  # fmt: skip
    state = root / "slurm"
    for name in ("ctld", "n1", "n2"):
        (state / name).mkdir(parents=True)
    conf = root / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), state=state))
    os.environ["SLURM_CONF"] = str(conf)
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    daemons = [["runuser", "-u", "munge", "--", "munged", "-F"],
               ["slurmctld", "-D", "-f", str(conf)],
               *(["slurmd", "-D", "-N", n, "-f", str(conf)] for n in ("n1", "n2"))]  # fmt: skip
    started = []
    try:
        for command in daemons:
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL))  # fmt: skip
            time.sleep(1)
        wait_for(lambda: "idle" in shell("sinfo", "-h", "-o", "%T", check=False), 60, "the nodes")
        yield
    finally:
        shell("scancel", "--user=root", check=False)
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def wait_for(condition: object, seconds: float, what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took more than {seconds} s: {shell('squeue', check=False)}")
        time.sleep(0.5)


def lines(run: Path) -> list[dict[str, float]]:
    """Return the steps in a run's history."""
    path = run / "history.jsonl"
    found = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, found) if "loss" in line]


def state_of(job: str) -> str:
    """Return a job's state, PENDING, RUNNING or what it ended with."""
    return shell("squeue", "-h", "-o", "%T", "-j", job, check=False) or "GONE"


def main() -> None:
    """Build, run, compare."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is stopped
    root = Path(tempfile.mkdtemp(prefix="cluster-"))
    tree = {**TREE, "training": {**TREE["training"], "num_epochs": 100, "num_steps": STEPS,
                                 "global_batch": 4, "valid_every": 1000}}  # fmt: skip
    tree["audio"] = {**TREE["audio"], "chunk_size": 16000}
    # So large that its steps take longer than the limit on quick machines too.
    tree["model"] = {"name": "conv", "base_channels": 80, "num_layers": 3}
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    for i in range(CLIPS):
        target, noise = noise_wave(2 * i, 20000), noise_wave(2 * i + 1, 20000)
        save(root / "clips" / f"sample_{i:05}" / "mixture.wav", (target + noise).clamp(-0.99, 0.99))
        save(root / "clips" / f"sample_{i:05}" / "vocals.wav", target)
    pack_folder(root / "clips", root / "s3" / "bucket" / "train", clips=10)
    with serve_s3(root / "s3") as env, slurm(root):
        os.environ.update(env, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
        url, run = "s3://bucket/train", root / "run"
        cache = ["--skip_doctor", "--set", f"data.cache_path={root / 'cache'}"]

        def submit(nodes: int, limit: str) -> str:
            job = write_job("slurm", config, url, run, nodes=str(nodes), gpus=0, time=limit,
                            margin=45, train=cache)  # fmt: skip
            return shell("sbatch", "--parsable", str(job))

        def come_back(job: str) -> None:
            wait_for(lambda: state_of(job) == "PENDING", 180, "the requeue")
            print(f"stopped after step {len(lines(run))}")

        begun = time.monotonic()
        job = submit(2, "2")
        wait_for(lambda: lines(run), 120, "the first step")
        come_back(job)  # by its time limit
        first = len(lines(run))
        shell("scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_for(lambda: len(lines(run)) > first + 20, 180, "the second start")
        shell("scancel", "--batch", "--signal=USR1", job)
        come_back(job)
        shell("scancel", job)
        second, job = len(lines(run)), submit(1, "30")
        wait_for(lambda: len(lines(run)) > second + 20, 180, "the run on one node")
        shell("scancel", "--batch", "--signal=USR1", job)
        come_back(job)
        shell("scancel", job)
        job = submit(2, "30")
        wait_for(lambda: state_of(job) == "GONE", 600, "the rest")
        print(f"{time.monotonic() - begun:.0f} s on the cluster")
        log = (run / "job.log").read_text(errors="replace")
        shell(sys.executable, "-m", "diffbuf_lib.cli", "train", "--config_path", str(config),
              "--data_path", str(root / "clips"), "--results_path", str(root / "whole"),
              "--skip_doctor")  # fmt: skip
    ours, whole = lines(run), lines(root / "whole")
    if [line["step"] for line in ours] != list(range(1, STEPS + 1)):
        raise AssertionError(f"steps {[line['step'] for line in ours]}\n{log[-5000:]}")
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, whole, strict=True))
    stops = log.count("saved at step")
    print(f"{STEPS} of {STEPS} steps, {stops} stops, losses within {apart:.1e}")
    if apart > 1e-4:
        raise AssertionError("the losses differ")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
