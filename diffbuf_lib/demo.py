"""The whole way on the embedded demo set: data, a short training, enhanced files, a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffbuf_lib.config import Config
from diffbuf_lib.data import DNLMDataset, build_demo, open_dataset, write_audio
from diffbuf_lib.evaluation import ScoredClip, evaluate, summary
from diffbuf_lib.model import DiffusionBufferModel, load_model
from diffbuf_lib.pretrained import DEFAULT as DEFAULT_MODEL
from diffbuf_lib.report import write_report
from diffbuf_lib.training import train
from diffbuf_lib.training.folder import ResultsFolder

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
    """Build the demo set, train a little, let the bundled model enhance held-out clips, report.

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

    rate = cfg.audio.sample_rate
    test_set = DNLMDataset(
        data_path / "test", TEST_SECONDS * rate, sample_rate=rate, training=False
    )
    say("3/4  enhancing the test clips, which were in nobody's training")
    small = load_model(folder.model, "cpu")
    trained = list(evaluate(small, test_set, METRICS))
    model = load_model(DEFAULT_MODEL, "cpu")
    clips = list(evaluate(model, test_set, METRICS))
    _write_audio(clips, trained, results_path / "audio", rate)

    say("4/4  report")
    report = results_path / "report.html"
    latency = model.sampler().delay - 1
    hop_ms = 1000 * model.cfg.audio.stft.hop_length / rate
    window_ms = 1000 * model.cfg.audio.stft.n_fft / rate
    write_report(
        report,
        cfg,
        results_path,
        clips,
        title="diffbuf demo",
        notes=[
            f"Clips, scores and spectrograms below are of {DEFAULT_MODEL}, the Diffusion Buffer of "
            f"{_parameters(model):,} parameters that comes with the package. It runs online, with "
            f"one network call a frame and a delay of {latency} hops ({latency * hop_ms:.0f} ms) "
            f"and the STFT window ({window_ms:.0f} ms).",
            f"Loss curve and config are of a small model of {_parameters(small):,} parameters "
            f"that was trained just now on {len(train_set)} synthetic clips, to show how that "
            f"goes. {_gain(trained)} Its sound is in audio/, as *_trained_here.wav.",
        ],
    )
    return report


def _parameters(model: DiffusionBufferModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _gain(clips: list[ScoredClip]) -> str:
    """Tell in a sentence what a model did to the SI-SDR of some clips."""
    (row,) = summary(clips, ["si_sdr"])
    return (
        f"It takes the mean SI-SDR of the same clips from {row.noisy:.2f} to {row.enhanced:.2f} dB."
    )


def _write_audio(
    clips: list[ScoredClip], trained: list[ScoredClip], folder: Path, sample_rate: int
) -> None:
    folder.mkdir(exist_ok=True)
    for index, (clip, own) in enumerate(zip(clips, trained, strict=True)):
        waves = {
            "mix": clip.mix,
            "target": clip.target,
            "estimate": clip.estimate,
            "estimate_trained_here": own.estimate,
        }
        for name, wave in waves.items():
            write_audio(folder / f"{index}_{name}.wav", wave[None], sample_rate, subtype="FLOAT")
