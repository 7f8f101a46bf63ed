"""SIGKILL at random moments: what is left can always be read and gone on from, to the bit."""

import random
import shutil
import signal
from multiprocessing import get_context

import pytest

from diffbuf_lib.training import load_checkpoint
from tests.training.helpers import assert_same_state, config, fit, history

SETTINGS = [
    "model.dropout=0.3",
    "training.num_epochs=4",
    "training.checkpoint_every=1",
    "training.metric_for_scheduler=loss",
]


def go_on(folder):
    """Start the run, or resume it: what a user's restart script does."""
    resume = (folder / "checkpoints" / "last.pt").exists()
    fit(config(*SETTINGS), folder, resume=resume)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    go_on(folder)
    return folder


def lines(folder):
    """How far a run has come: lines of its history, of steps and validations."""
    path = folder / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.law
@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_random_kills(unbroken, tmp_path, kills):
    """Moments are drawn in lines of history, so that they differ however slow the machine is."""
    rng, done, runs, places = random.Random(kills), 0, 0, set()
    total = lines(unbroken)
    folder = tmp_path / "run0"
    while done < kills:
        here = lines(folder)
        moment = rng.randint(here, min(here + total // 2, total))
        process = get_context("fork").Process(target=go_on, args=(folder,))
        process.start()
        while process.exitcode is None and lines(folder) < moment:
            process.join(0.002)
        process.join(rng.uniform(0, 0.05))
        if process.exitcode is None:
            process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster: begin another run
            assert_same_state(unbroken, folder)
            runs += 1
            folder = tmp_path / f"run{runs}"
            continue
        assert process.exitcode == -signal.SIGKILL
        done += 1
        for file in folder.glob("checkpoints/*.pt"):
            places.add((file.name, load_checkpoint(file)["step"]))
        copy = tmp_path / "copy"
        if folder.exists():
            shutil.copytree(folder, copy)
        go_on(copy)
        assert_same_state(unbroken, copy)
        assert history(unbroken) == history(copy)
        assert not list(copy.rglob(".*"))
        shutil.rmtree(copy)
    assert len(places) > min(kills, 8) // 4, "the kills must come at different moments"
