"""What the notebooks lean on: an oracle, models, measures that are right."""

import shlex
from types import SimpleNamespace

import pytest
import torch

from diffbuf_lib import OnlineEnhancer
from diffbuf_lib.config import build_config
from diffbuf_lib.diffusion.buffer import perturb
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.diffusion.spectral import Spectral
from tests.conftest import TINY, make_model, refused, seeded, stream
from tests.notebook.cells import CONFIG
from tests.notebook.conftest import batch
from tests.notebook.folders import make_paired_folder
from tests.training.helpers import same
from walk import launch, listening, models, open_workbench, oracle

SDES = [
    ["sde.type=bbed"],
    ["sde.type=bbed", "sde.diffusion.c=0.08"],
    ["sde.type=bbed", "sde.diffusion.theta=0.52", "sde.diffusion.k=1.4"],
    ["sde.type=ouve"],
    ["sde.type=ouve", "sde.diffusion.gamma=0.7"],
]
FRAMES = [
    [],
    ["audio.stft.n_fft=80", "audio.stft.hop_length=20"],
    ["audio.stft.center=false"],
    ["audio.stft.window=sqrt_hann", "preprocessing.magnitude_compression.alpha=1"],
    ["audio.stft.window=hamming"],
]


@pytest.fixture
def bench(project):
    """A workbench on two-second pairs."""
    data = make_paired_folder(project / "own", train=4, valid=2)
    small = ("audio.chunk_size=4000", "diffusion_buffer.buffer_size=4")
    return open_workbench(CONFIG, data, small)


@pytest.mark.law
@pytest.mark.parametrize("overrides", SDES, ids=" ".join)
def test_sigma_and_v_of_the_oracle_are_those_of_the_library(overrides):
    sde = build_config({}, overrides).sde
    t = torch.linspace(1e-3, 0.99, 40, dtype=torch.float64)
    torch.testing.assert_close(oracle.sigma(sde, t), make_sde(sde).std(t), rtol=1e-5, atol=0)
    S, Y, z = (torch.randn(2, 5, n, dtype=torch.complex64, generator=seeded(n)) for n in (7, 7, 3))
    t = torch.rand(2, 3, generator=seeded()).sort().values * 0.9 + 0.05
    V = perturb(S, Y, t, z, make_sde(sde))
    torch.testing.assert_close(oracle.perturbed(S, Y, t, z, sde), V, rtol=1e-4, atol=1e-5)


@pytest.mark.law
@pytest.mark.parametrize("overrides", FRAMES)
def test_spectrum_of_the_oracle_is_that_of_the_model(overrides):
    cfg = build_config(TINY, overrides)
    mix, _ = batch()
    spectral = Spectral.from_config(cfg.audio.stft, cfg.preprocessing.magnitude_compression)
    expected = spectral(mix.mean(1))
    torch.testing.assert_close(oracle.spectrum(mix, cfg), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.law
@pytest.mark.parametrize(
    "override", ["sde.diffusion={c: 0.08}", "audio.stft.hop_length=31", "audio.stft.window=hamming"]
)
def test_the_oracle_notices_what_is_wrong(tiny_cfg, override):
    """What the notebooks assert does not hold for a model of another config."""
    trace = make_model(tiny_cfg).trace(*batch(), seeded())
    cfg = build_config(TINY, [override])
    Y = oracle.spectrum(trace.mix, cfg)
    same_Y = Y.shape == trace.Y.shape and torch.allclose(trace.Y, Y, atol=1e-3)
    assert not (same_Y and torch.allclose(oracle.sigma(cfg.sde, trace.t), trace.sigma, rtol=1e-3))


def test_a_model_is_loaded_or_trained_here_or_refused(bench, tiny_cfg):
    model = make_model(tiny_cfg)
    model.save_pretrained(bench.root / "results" / "run" / "model")
    found = models.find_model(bench, "results/run/model", bench.results / "07")
    assert not found.trained_here
    assert same(model.state_dict(), found.model.state_dict())
    for _ in range(2):  # as when a notebook is run twice
        found = models.find_model(bench, "diffbuf/no-such-model", bench.results / "07", steps=2)
        assert found.trained_here
        assert found.model.cfg.audio == bench.cfg.audio
    make_model(tiny_cfg.override("audio.sample_rate=8000")).save_pretrained(bench.root / "model8k")
    for name, said in (("results/no/model", "results/no/model"), ("model8k", "8000 Hz")):
        refused(lambda name=name: models.find_model(bench, name, bench.results / "07"), said)


def test_held_out_takes_valid_or_test_and_cuts_to_what_there_is(bench):
    half = listening.held_out(bench, bench.cfg, seconds=0.75)
    whole = listening.held_out(bench, bench.cfg, seconds=30)
    assert half.root.name == whole.root.name == "valid"
    assert half[0][0].shape == (1, 12000)
    assert whole[0][0].shape == (1, 32000), "clips of 2 s must not be padded to 30 s"
    make_paired_folder(bench.data / "more", train=1, valid=1)
    (bench.data / "more" / "valid").rename(bench.data / "test")
    assert listening.held_out(bench, bench.cfg).root.name == "test"


@pytest.mark.law
@pytest.mark.parametrize("shift", [0, 5, 256, -31])
def test_lag_is_found_under_a_hum_and_for_any_level(shift):
    hum = torch.sin(2 * torch.pi * 100 * torch.arange(8000) / 16000)
    mixes = [torch.randn(8000, generator=seeded(i)) + 3 * hum for i in range(2)]
    clips = [
        SimpleNamespace(mix=mix, estimate=gain * mix.roll(shift))
        for mix, gain in zip(mixes, (0.01, 3.0), strict=True)
    ]
    assert listening.lag_samples(clips) == shift


@pytest.mark.law
def test_measured_latency_is_counted_not_asked(tiny_cfg):
    enhancer = OnlineEnhancer(make_model(tiny_cfg.override("training.loss=data_prediction")))
    window, hop = 62, 32
    assert listening.measured_latency(enhancer) == window // 2 + 3 * hop
    assert listening.measured_latency(enhancer, limit=3) == 3


@pytest.mark.law
def test_delay_scores_are_those_of_the_stream(tiny_cfg, bench):
    model = make_model(tiny_cfg.override("training.loss=data_prediction"))
    assert listening.delay_settings(model) == [(4, 1), (4, 2), (4, 3), (4, 4), (2, 2), (3, 3)]
    dataset = listening.held_out(bench, model.cfg, seconds=0.5)
    rows = listening.delay_scores(model, dataset, [(4, 2), (2, 2)], ["si_sdr"], clips=2)
    assert rows[0].latency_ms == rows[1].latency_ms == pytest.approx(1000 * (31 + 32) / 16000)
    mix, target = (torch.stack([dataset[i][k][0] for i in range(2)]) for k in (0, 1))
    estimate = stream(OnlineEnhancer(model, seed=0, delay=2, batch=2), mix)
    gains = si_sdr(estimate, target) - si_sdr(mix, target)
    torch.testing.assert_close(rows[0].gains["si_sdr"], gains.float(), atol=1e-3, rtol=1e-3)
    assert rows[0].mean("si_sdr") == pytest.approx(float(gains.mean()), abs=1e-3)


def si_sdr(estimate, target):
    """In dB, from its definition (Le Roux et al. 2019)."""
    estimate, target = estimate.double(), target.double()
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True)
    wanted = scale * target
    return 10 * (wanted.square().sum(-1) / (estimate - wanted).square().sum(-1)).log10()


def test_torchrun_understands_a_command_and_what_train_refuses_is_told():
    from torch.distributed.run import get_args_parser

    paths = ("configs/a b.yaml", "results/run", "data/train", "data/valid")
    command = launch.launch_command(*paths, processes=3, flags=["--no_such"])
    torchrun = get_args_parser().parse_args(command[1:])
    assert (torchrun.training_script, torchrun.nproc_per_node) == ("train.py", "3")
    assert shlex.split(launch.shell_line(command).replace("\\\n", "")) == command
    refused(lambda: launch.parse_command(command), "refuses", "--no_such")
