import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.evaluation import Job, evaluate_folder
from tests.conftest import TINY, make_model

RATE = 16000


def voice(seconds=1.0, seed=0):
    """[T]: a buzz in syllables with a little noise, enough for PESQ and ESTOI to find speech."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(RATE * seconds)) / RATE
    pitch = 110 + 10 * seed
    buzz = sum(np.sin(2 * np.pi * pitch * h * time) / h for h in range(1, 12))
    syllables = 1 + np.sin(2 * np.pi * 4 * time + seed)
    return (0.1 * buzz * syllables + 0.005 * rng.standard_normal(len(time))).astype(np.float32)


def noisy_voice(seconds=2.0, level=0.03):
    """mix, target [T]: the voice with and without white noise."""
    target = torch.from_numpy(voice(seconds))
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(len(target))).float()
    return target + level * noise, target


def write_clip(root, number, target, mix):
    folder = root / f"sample_{number:05}"
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "vocals.wav", target, RATE, "FLOAT")
    soundfile.write(folder / "mixture.wav", mix, RATE, "FLOAT")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Six clips: lengths and SNRs differ, number 4 is silent speech, number 5 lasts 0.1 s."""
    root = tmp_path_factory.mktemp("evaluation") / "clips"
    rng = np.random.default_rng(1)
    facts = [(1.0, 0.1), (0.8, 0.03), (1.0, 0.3), (0.9, 0.1), (0.7, 0.1), (0.1, 0.1)]
    for number, (seconds, level) in enumerate(facts):
        target = voice(seconds, number) * (number != 4)
        noise = level * rng.standard_normal(len(target)).astype(np.float32)
        write_clip(root, number, target, target + noise)
    return root


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A saved data-prediction model, B = 4, that changes its input."""
    path = tmp_path_factory.mktemp("evaluation") / "model"
    cfg = build_config(TINY, ["training.loss=data_prediction", "model.x0_output=mask"])
    make_model(cfg).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def job(model_path, data):
    """What is evaluated, in three batches."""
    return Job(
        model=str(model_path), data_path=str(data), metrics=("si_sdr", "pesq", "estoi"),
        batch_size=2, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished(job, tmp_path_factory):
    """Its results folder."""
    path = tmp_path_factory.mktemp("evaluation") / "results"
    evaluate_folder(job, path, processes=1, page=False)
    return path
