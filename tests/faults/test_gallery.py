"""Every failure that a user meets, provoked for real."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib.config import load_config
from diffbuf_lib.data import open_dataset
from diffbuf_lib.errors import DiffbufError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import load_checkpoint, save_checkpoint, train
from diffbuf_lib.training import run as run_module
from diffbuf_lib.training.folder import KEYS
from tests.faults import gallery
from tests.faults.gallery import FAULTS, fault
from tests.training.helpers import Clips, config, fit, kill_at, last


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row.name.replace(" ", "-"))
def test_fault(row, tmp_path):
    error = row.provoke(tmp_path)
    assert type(error).__name__ == row.error
    assert row.says in str(error)
    if isinstance(error, DiffbufError):
        assert "\n" not in str(error)


def test_every_failure_of_the_issue_is_there():
    names = (
        "sigma zero; t_eps 0; t_max 1.2; buffer_size over frames; zero frames; mono/stereo "
        "mismatch; `[C, T]` given for `[B, C, T]`; fp16 overflow; NaN in a file; Inf in a weight; "
        "exploding gradient; corrupt wav header; truncated flac; zero-byte file; deleted file in "
        "mid-epoch; permission denied; wrong sample rate; mismatched lengths; empty dataset; "
        "duplicate stems; out of memory; disk full while checkpointing; SIGKILL while "
        "checkpointing; SIGTERM in mid-step; worker killed; corrupt checkpoint; checkpoint of "
        "another architecture; checkpoint that carries a malicious pickle; YAML with a Python "
        "object tag; misspelt key; wrong type; unreadable results folder; two runs in one results "
        "folder"
    )
    assert [row.name for row in FAULTS[: names.count(";") + 1]] == names.split("; ")


def test_readme_is_up_to_date():
    assert gallery.README.read_text(encoding="utf-8") == gallery.table(), (
        "run python -m tests.faults.gallery"
    )


# The config.


@fault("sigma zero", "t_eps=1e-60, which is 0 in float32", "NonFiniteError",
       "First bad value: sigma t=0: sigma is 0 at diffusion time 0")  # fmt: skip
def _sigma_zero(folder: Path) -> BaseException:
    return _caught(lambda: fit(config("diffusion_buffer.t_eps=1e-60"), folder, valid_set=None))


@fault("t_eps 0", "diffusion_buffer.t_eps=0", "ConfigError",
       "diffusion_buffer.t_eps = 0: input should be greater than 0")  # fmt: skip
def _t_eps(folder: Path) -> BaseException:
    return _caught(lambda: config("diffusion_buffer.t_eps=0"))


@fault("t_max 1.2", "diffusion_buffer.t_max=1.2", "ConfigError",
       "diffusion_buffer.t_max = 1.2: input should be less than or equal to 1")  # fmt: skip
def _t_max(folder: Path) -> BaseException:
    return _caught(lambda: config("diffusion_buffer.t_max=1.2"))


@fault("buffer_size over frames", "buffer_size=80 with 65 frames", "ConfigError",
       "buffer_size 80 is larger than the 65 STFT frames of a 4000-sample")  # fmt: skip
def _buffer_size(folder: Path) -> BaseException:
    return _caught(lambda: config("diffusion_buffer.buffer_size=80"))


@fault("zero frames", "a chunk of 50 samples for n_fft 62, not centred", "ConfigError",
       "Buffer size must be at least 1. A 50-sample chunk gives no STFT frame")  # fmt: skip
def _frames(folder: Path) -> BaseException:
    return _caught(lambda: config("audio.chunk_size=50", "audio.stft.center=false"))


# The data.


@fault("mono/stereo mismatch", "a stereo mixture beside mono vocals", "DataError",
       "mixture.wav has 2 channels but")  # fmt: skip
def _stereo(folder: Path) -> BaseException:
    _write(folder, 2, "mixture.wav", np.zeros((4000, 2)))
    return _train(folder)


@fault("`[C, T]` given for `[B, C, T]`", "model(clip, clip)", "ShapeError",
       "a batch must be [B, C, T], not [1, 4000]: add the batch axis with")  # fmt: skip
def _batch_axis(folder: Path) -> BaseException:
    mix, target = Clips()[0]
    return _caught(lambda: DiffusionBufferModel(config())(mix, target))


@fault("fp16 overflow", "a layer's output beyond 65504, under float16 autocast", "NonFiniteError",
       "In float32 the same batch is finite")  # fmt: skip
def _fp16(folder: Path) -> BaseException:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def make(training: object, device: str) -> Accelerator:
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        return accelerator

    model = DiffusionBufferModel(config())
    torch.nn.init.constant_(model.network.layers[0].weight, 3e4)
    torch.nn.init.constant_(model.network.last.weight, 1e-9)
    with patch.object(run_module, "make_accelerator", make):
        return _caught(lambda: fit(config(), folder, valid_set=None, model=model))


@fault("NaN in a file", "a float wav with one NaN", "DataError",
       "mixture.wav holds 1 NaN or Inf samples: make the file again")  # fmt: skip
def _nan_file(folder: Path) -> BaseException:
    wave = np.zeros(4000)
    wave[17] = np.nan
    _write(folder, 2, "mixture.wav", wave, "FLOAT")
    return _train(folder)


@fault("Inf in a weight", "one weight of a start set to Inf", "NonFiniteError",
       "First bad value: module network.first: its output")  # fmt: skip
def _inf_weight(folder: Path) -> BaseException:
    model = DiffusionBufferModel(config())
    model.network.first.weight.data[0] = torch.inf
    return _caught(lambda: fit(config(), folder, valid_set=None, model=model))


@fault("exploding gradient", "a loss of 1e37, whose gradient's norm overflows", "NonFiniteError",
       "but the gradient norm is inf")  # fmt: skip
def _exploding(folder: Path) -> BaseException:
    class Steep(DiffusionBufferModel):
        def forward(self, mix, target=None, generator=None):
            return 1e37 * super().forward(mix, target, generator)

    return _caught(lambda: fit(config(), folder, valid_set=None, model=Steep(config())))


@fault("corrupt wav header", "random bytes after RIFF", "DataError",
       "mixture.wav cannot be read as audio")  # fmt: skip
def _header(folder: Path) -> BaseException:
    path = _write(folder, 2, "mixture.wav", np.zeros(4000))
    path.write_bytes(b"RIFF\x10\x00\x00\x00" + bytes(range(100)))
    return _train(folder)


@fault("truncated flac", "half of a flac file", "DataError", "mixture.flac is ")
def _flac(folder: Path) -> BaseException:
    _tree(folder)
    (folder / "sample_00002" / "mixture.wav").unlink()
    noise = 0.1 * np.random.default_rng(0).standard_normal(4000)
    path = _write(folder, 2, "mixture.flac", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return _train(folder)


@fault("zero-byte file", "an empty vocals.wav", "DataError", "vocals.wav is empty (0 bytes)")
def _zero_bytes(folder: Path) -> BaseException:
    _write(folder, 2, "vocals.wav", np.zeros(4000)).write_bytes(b"")
    return _train(folder)


@fault("deleted file in mid-epoch", "a sample removed after the first step", "DataError",
       "mixture.wav does not exist: check the path")  # fmt: skip
def _deleted(folder: Path) -> BaseException:
    return _train(folder, lambda: [shutil.rmtree(path) for path in folder.glob("sample_*")])


@fault("permission denied", "a file that the user may not read", "DataError",
       "mixture.wav cannot be read as audio (Permission denied)")  # fmt: skip
def _permission(folder: Path) -> BaseException:
    with _as_nobody() as public:
        path = _write(public, 2, "mixture.wav", np.zeros(4000))
        path.chmod(0)
        return _train(public)


@fault("wrong sample rate", "8 kHz files", "DataError",
       "has a sample rate of 8000 Hz but audio.sample_rate is 16000")  # fmt: skip
def _rate(folder: Path) -> BaseException:
    for name in ("mixture.wav", "vocals.wav"):
        _write(folder, 2, name, np.zeros(4000), rate=8000)
    return _train(folder)


@fault("mismatched lengths", "vocals shorter than the mixture", "DataError",
       "vocals.wav has 3000: cut both to the same length")  # fmt: skip
def _lengths(folder: Path) -> BaseException:
    _write(folder, 2, "vocals.wav", np.zeros(3000))
    return _train(folder)


@fault("empty dataset", "an empty folder", "DataError", "has no sample_*/ folders with mixture.wav")
def _empty(folder: Path) -> BaseException:
    return _caught(lambda: open_dataset(1, folder, config(), training=True))


@fault("duplicate stems", "vocals.wav and vocals.flac in one sample", "DataError",
       "has both vocals.wav and vocals.flac: remove one of them")  # fmt: skip
def _stems(folder: Path) -> BaseException:
    _write(folder, 2, "vocals.flac", np.zeros(4000))
    return _train(folder)


# The machine.


@fault("out of memory", "an allocation of 8 TB in the forward pass", "OutOfMemoryError",
       "GiB more were asked for in a step of 2 clips of 4000 samples")  # fmt: skip
def _memory(folder: Path) -> BaseException:
    class Hungry(DiffusionBufferModel):
        def forward(self, mix, target=None, generator=None):
            return torch.empty(len(mix), 10**12) if len(mix) > 1 else super().forward(mix, target)

    return _caught(lambda: fit(config(), folder, valid_set=None, model=Hungry(config())))


@fault("disk full while checkpointing", "a system limit of 4 kB a file, after the first step",
       "CheckpointError", "last.pt cannot be written")  # fmt: skip
def _disk(folder: Path) -> BaseException:
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run = train(config(), Clips(), None, folder, device="cpu")
        next(run)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        error = _caught(lambda: list(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert last(folder)["step"] == 0
    assert len(fit(config(), folder, resume=True)) == 6
    return error


@fault("SIGKILL while checkpointing", "just before the third checkpoint takes its name",
       "KilledError", "resumed from step 2 to 6")  # fmt: skip
def _sigkill(folder: Path) -> BaseException:
    cfg = config("training.checkpoint_every=2")

    def child() -> None:
        for _ in train(cfg, kill_at("writing"), Clips(3, seed=1), folder, device="cpu"):
            pass

    process = get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    step = last(folder)["step"]
    return KilledError(f"resumed from step {step} to {fit(cfg, folder, resume=True)[-1].step}")


@fault("SIGTERM in mid-step", "sent while a batch of the second step is read",
       "KeyboardInterrupt", "saved at step 2")  # fmt: skip
def _sigterm(folder: Path) -> BaseException:
    class Signalling(Clips):
        def __getitem__(self, index):
            if len(self.read) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    error = _caught(lambda: fit(config(), folder, train_set=Signalling(), valid_set=None))
    return type(error)(f"saved at step {last(folder)['step']}")


@fault("worker killed", "SIGKILL of a reading process", "DataError",
       "a process that reads clips died at clip_005.wav: lower training.num_workers")  # fmt: skip
def _worker(folder: Path) -> BaseException:
    class Deadly(Clips):
        def __getitem__(self, index):
            if index == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    cfg = config("training.num_workers=1")
    return _caught(lambda: fit(cfg, folder, train_set=Deadly(), valid_set=None))


# Files of the run.


@fault("corrupt checkpoint", "last.pt cut in half", "CheckpointError",
       "last.pt is damaged or cut short: take another one, such as best.pt")  # fmt: skip
def _corrupt(folder: Path) -> BaseException:
    fit(config(), folder, steps=1)
    path = folder / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return _caught(lambda: fit(config(), folder, resume=True))


@fault("checkpoint of another architecture", "base_channels 4 into 8", "CheckpointError",
       "in this model [8")  # fmt: skip
def _architecture(folder: Path) -> BaseException:
    fit(config(), folder / "a", steps=1)
    start = folder / "a" / "checkpoints" / "last.pt"
    wide = config("model.base_channels=8")
    return _caught(lambda: fit(wide, folder / "b", start_check_point=start))


class Malicious:
    def __reduce__(self):
        return (os.mkdir, (os.environ["DIFFBUF_TEST_TARGET"],))


@fault("checkpoint that carries a malicious pickle", "a pickle that makes a folder",
       "CheckpointError", "it holds more than tensors and plain values, and reading")  # fmt: skip
def _malicious(folder: Path) -> BaseException:
    with patch.dict(os.environ, DIFFBUF_TEST_TARGET=str(folder / "made")):
        torch.save(dict.fromkeys(KEYS) | {"config": Malicious()}, folder / "last.pt")
        error = _caught(lambda: load_checkpoint(folder / "last.pt"))
        assert not (folder / "made").exists()
        pickle.loads(pickle.dumps(Malicious()))
        assert (folder / "made").exists(), "the file must be able to do harm"
    return error


@fault("YAML with a Python object tag", "!!python/object/apply:os.system", "ConfigError",
       "is not plain YAML")  # fmt: skip
def _tag(folder: Path) -> BaseException:
    made = folder / "made"
    return _yaml(folder, f"training: !!python/object/apply:os.system ['mkdir {made}']", made)


@fault("misspelt key", "training.learning_rte", "ConfigError", "unknown key training.lrr: did you")
def _misspelt(folder: Path) -> BaseException:
    return _yaml(folder, "training: {lrr: 1}")


@fault("wrong type", "training.lr: fast", "ConfigError", "training.lr = 'fast': input should be a")
def _type(folder: Path) -> BaseException:
    return _yaml(folder, "training: {lr: fast}")


@fault("unreadable results folder", "a folder of another user", "CheckpointError",
       "cannot be written (Permission denied): choose another --results_path")  # fmt: skip
def _unreadable(folder: Path) -> BaseException:
    with _as_nobody() as public:
        results = public / "results"
        results.mkdir()
        results.chmod(0)
        return _caught(lambda: fit(config(), results))


@fault("two runs in one results folder", "a second train() while one goes on", "CheckpointError",
       "is in use by another run (process ")  # fmt: skip
def _two_runs(folder: Path) -> BaseException:
    first = train(config(), Clips(), None, folder, device="cpu")
    next(first)
    try:
        return _caught(lambda: fit(config(), folder, resume=True))
    finally:
        first.close()


@fault("folder of a finished run", "the same command again, without --resume", "CheckpointError",
       "already holds a run (config.yaml): add --resume to go on with it")  # fmt: skip
def _again(folder: Path) -> BaseException:
    fit(config(), folder, steps=1)
    return _caught(lambda: fit(config(), folder))


@fault("resume with another config", "training.lr changed", "CheckpointError",
       "holds a run of another config: training.lr was 0.001, is 0.01")  # fmt: skip
def _other_config(folder: Path) -> BaseException:
    fit(config(), folder, steps=1)
    return _caught(lambda: fit(config("training.lr=0.01"), folder, resume=True))


@fault("checkpoint with foreign contents", "an optimizer state that is none", "CheckpointError",
       "does not fit this model and optimizer (TypeError")  # fmt: skip
def _foreign(folder: Path) -> BaseException:
    fit(config(), folder, steps=1)
    state = last(folder)
    del state["format"]
    save_checkpoint(folder / "checkpoints" / "last.pt", state | {"optimizer": [1, 2]})
    return _caught(lambda: fit(config(), folder, resume=True))


class KilledError(Exception):
    """A process that ended without a word; what came after."""


def _caught(action) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def _tree(folder: Path) -> None:
    """Write a DN-LM split of four samples."""
    rng = np.random.default_rng(0)
    for i in range(4):
        sample = folder / f"sample_{i:05}"
        if not sample.exists():
            sample.mkdir(parents=True)
            for name in ("mixture.wav", "vocals.wav"):
                soundfile.write(sample / name, 0.1 * rng.standard_normal(4000), 16000)


def _write(
    folder: Path, i: int, name: str, wave: np.ndarray, subtype: str | None = None, rate: int = 16000
) -> Path:
    """Put a file into a sample of a split."""
    _tree(folder)
    path = folder / f"sample_{i:05}" / name
    soundfile.write(path, wave, rate, subtype=subtype)
    return path


def _train(folder: Path, after_a_step=None) -> BaseException:
    """Train on a split; its dataset is opened within, since that may fail already."""
    _tree(folder)

    def action() -> None:
        dataset = open_dataset(1, folder, config(), training=True)
        with tempfile.TemporaryDirectory() as results:
            for _ in train(config(), dataset, None, results, device="cpu"):
                if after_a_step is not None:
                    after_a_step()

    return _caught(action)


def _yaml(folder: Path, text: str, made: Path | None = None) -> BaseException:
    (folder / "config.yaml").write_text(text)
    error = _caught(lambda: load_config(folder / "config.yaml"))
    assert made is None or not made.exists()
    return error


@contextmanager
def _as_nobody() -> Iterator[Path]:
    """Lay down the super-user's rights, to whom nothing is forbidden; give a folder to write in."""
    user = os.geteuid()
    public = Path(tempfile.mkdtemp())
    try:
        if user == 0:
            os.chown(public, 65534, 65534)
            os.seteuid(65534)
        yield public
    finally:
        if user == 0:
            os.seteuid(0)
        for path in [public, *public.rglob("*")]:
            path.chmod(0o700)
        shutil.rmtree(public)
