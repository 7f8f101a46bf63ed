"""The whole way on the embedded demo set: data, training, enhanced files, a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data import DNLMDataset, build_demo, open_dataset, write_audio
from diffbuf_lib.evaluation import ScoredClip, evaluate
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.report import write_report
from diffbuf_lib.training import train
from diffbuf_lib.training.results import ResultsFolder

TEST_SECONDS = 6
METRICS = ("si_sdr", "sdr", "pesq", "estoi")


def run_demo(
    cfg: Config,
    data_path: Path,
    results_path: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Path:
    """Build the demo set, train, enhance the held-out clips and write the report.

    What is there already is kept: the set is not built again, and a run that was interrupted goes
    on where it stopped.

    Args:
        cfg: what to train; `configs/demo.yaml` takes a few minutes on two CPU cores.
        data_path: where the demo set is, or will be made.
        results_path: the run's folder; report.html and audio/ are put there too.
        say: told in one line what comes next.
        progress: show progress bars on stderr.

    Returns:
        The report's path.

    Raises:
        DiffbufError: as in `build_demo`, `train` and `evaluate`.
    """
    say(f"1/4  dataset: {data_path}")
    build_demo(data_path, progress=progress)
    train_set = open_dataset(1, data_path / "train", cfg, training=True)
    valid_set = open_dataset(1, data_path / "valid", cfg, training=False)

    folder = ResultsFolder(results_path)
    say(f"2/4  training on {len(train_set)} clips: {results_path}")
    for _ in train(
        cfg, train_set, valid_set, results_path, resume=folder.last.exists(), progress=progress
    ):
        pass

    say("3/4  enhancing the test clips, whose speakers and drones were not in training")
    model = DiffusionBufferModel.from_pretrained(folder.model)
    rate = cfg.audio.sample_rate
    test_set = DNLMDataset(
        data_path / "test", TEST_SECONDS * rate, sample_rate=rate, training=False
    )
    clips = list(evaluate(model, test_set, METRICS))
    (results_path / "audio").mkdir(exist_ok=True)
    for path, wave in _files(clips, results_path / "audio"):
        write_audio(path, wave[None], rate, subtype="FLOAT")

    say("4/4  report")
    report = results_path / "report.html"
    latency = model.sampler().delay - 1
    hop_ms = 1000 * cfg.audio.stft.hop_length / rate
    window_ms = 1000 * cfg.audio.stft.n_fft / rate
    write_report(
        report,
        cfg,
        results_path,
        clips,
        title="diffbuf demo",
        notes=[
            f"A Diffusion Buffer of {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"trained on {len(train_set)} synthetic clips of speech under drone noise. It shows "
            "that everything works; a model to use takes more data and hours of training.",
            f"It runs online, with one network call a frame and a delay of {latency} hops "
            f"({latency * hop_ms:.0f} ms) and the STFT window ({window_ms:.0f} ms).",
        ],
    )
    return report


def _files(clips: list[ScoredClip], folder: Path) -> Iterator[tuple[Path, Tensor]]:
    for index, clip in enumerate(clips):
        yield folder / f"{index}_mix.wav", clip.mix
        yield folder / f"{index}_target.wav", clip.target
        yield folder / f"{index}_estimate.wav", clip.estimate
