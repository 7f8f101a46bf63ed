import numpy as np
import pytest
import soundfile

from tests.conftest import make_model

RATE = 16000


def voice(seconds=1.0, seed=0):
    """[T]: a buzz in syllables with a little noise, enough for PESQ and ESTOI to find speech."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(RATE * seconds)) / RATE
    pitch = 110 + 10 * seed
    buzz = sum(np.sin(2 * np.pi * pitch * h * time) / h for h in range(1, 12))
    syllables = 1 + np.sin(2 * np.pi * 4 * time + seed)
    return (0.1 * buzz * syllables + 0.005 * rng.standard_normal(len(time))).astype(np.float32)


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
    for number, (seconds, level) in enumerate(
        [(1.0, 0.1), (0.8, 0.03), (1.0, 0.3), (0.9, 0.1), (0.7, 0.1), (0.1, 0.1)]
    ):
        target = voice(seconds, number) * (number != 4)
        noise = level * rng.standard_normal(len(target)).astype(np.float32)
        write_clip(root, number, target, target + noise)
    return root


@pytest.fixture
def model_path(tiny_cfg, tmp_path):
    """A saved data-prediction model, B = 4, that changes its input."""
    path = tmp_path / "model"
    cfg = tiny_cfg.override("training.loss=data_prediction", "model.x0_output=mask")
    make_model(cfg).save_pretrained(path)
    return path
