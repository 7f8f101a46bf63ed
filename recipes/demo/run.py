"""The whole demo on the embedded set: data, a short training, enhanced files, a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffbuf_lib.config import Config
from diffbuf_lib.data import DNLMDataset, open_dataset, write_audio
from diffbuf_lib.evaluation import evaluate
from diffbuf_lib.evaluation.page import write_page
from diffbuf_lib.model import load_model
from diffbuf_lib.pretrained import DEFAULT as DEFAULT_MODEL
from diffbuf_lib.training import train
from diffbuf_lib.training.folder import ResultsFolder, read_history
from recipes.demo.demo_set import build_demo
from recipes.demo.means import summary
from recipes.demo.progress import training_progress

TEST_SECONDS = 6
METRICS = ("si_sdr", "sdr", "pesq", "estoi")


def run_demo(
    cfg: Config,  # what to train; `configs/demo.yaml` takes a few minutes on two CPU cores
    data_path: Path,  # where the demo set is, or will be made
    results_path: Path,  # the run's folder; audio/ and report.html go there too
    *,
    say: Callable[[str], None] = lambda line: None,  # called with one line about the next step
    progress: bool = False,  # show progress bars on stderr
) -> Path:
    """Build the demo set, train briefly, enhance held-out clips with the bundled model, report.

    Existing results are kept, and an interrupted run continues where it stopped. Returns the
    report's path.
    """
    say(f"1/4  dataset: {data_path}")
    build_demo(data_path, progress=progress)
    train_set = open_dataset(1, data_path / "train", cfg, training=True)
    valid_set = open_dataset(1, data_path / "valid", cfg, training=False)
    folder = ResultsFolder(results_path)
    resume = folder.last.exists()
    say(f"2/4  training on {len(train_set)} clips: {results_path}")
    for _ in train(cfg, train_set, valid_set, results_path, resume=resume, progress=progress):
        pass

    say("3/4  enhancing the test clips, which were in nobody's training")
    rate, audio = cfg.audio.sample_rate, results_path / "audio"
    tests = DNLMDataset(data_path / "test", TEST_SECONDS * rate, sample_rate=rate, training=False)
    small, model = load_model(folder.model, "cpu"), load_model(DEFAULT_MODEL, "cpu")
    trained, clips = (list(evaluate(m, tests, METRICS)) for m in (small, model))
    audio.mkdir(exist_ok=True)
    for i, (clip, own) in enumerate(zip(clips, trained, strict=True)):
        waves = {"mix": clip.mix, "target": clip.target, "estimate": clip.estimate}
        for name, wave in (waves | {"estimate_trained_here": own.estimate}).items():
            write_audio(audio / f"{i}_{name}.wav", wave[None], rate, subtype="FLOAT")

    say("4/4  report")
    history = list(read_history(folder.history))
    first = next(evaluate(small, valid_set, METRICS[:1], limit=1))
    course = training_progress(
        history, {"mix": first.mix, "estimate": first.estimate, "target": first.target},
        cfg.audio, metric=cfg.training.metrics[0],
    )  # fmt: skip
    stft, hops = model.cfg.audio.stft, model.sampler().delay - 1
    report = results_path / "report.html"
    write_page(
        report, "demo", [(f"{number}", clip) for number, clip in enumerate(clips, 1)], METRICS,
        cfg.audio, means=summary(clips, METRICS), own=summary(trained, ["si_sdr"])[0],
        course=course, config=cfg.to_yaml(), name=DEFAULT_MODEL, trained_on=len(train_set),
        parameters=sum(p.numel() for p in model.parameters()),
        small=sum(p.numel() for p in small.parameters()),
        hops=hops, hops_ms=1000 * hops * stft.hop_length / rate, window_ms=1000 * stft.n_fft / rate,
    )  # fmt: skip
    return report
