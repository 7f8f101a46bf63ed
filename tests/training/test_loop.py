"""What a run computes, and how it ends."""

import copy

import pytest
import torch

from diffbuf_lib.diagnostics.capsule import Capsule
from diffbuf_lib.errors import DataError, NonFiniteError
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import load_checkpoint, load_weights, train
from diffbuf_lib.training import run as run_module
from diffbuf_lib.training.feed import EpochPlan, Stream, example_generators, stream_seed
from diffbuf_lib.training.step import make_accelerator, validate
from tests.conftest import refused
from tests.training.helpers import (
    Clips,
    Hooked,
    assert_same_state,
    config,
    fit,
    history,
    last,
    same,
    scaled,
)


@pytest.mark.law
def test_one_clip_is_learnt(tmp_path):
    """The whole chain learns: with a single clip the loss falls to a fraction."""
    cfg = config("training.num_epochs=150", "training.lr=0.01", "model.base_channels=8")
    losses = [r.loss for r in fit(cfg, tmp_path, train_set=Clips(1), valid_set=None)]
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


def test_records_and_their_history(tmp_path):
    records = fit(config("training.valid_every=2"), tmp_path)
    assert [(r.step, r.epoch) for r in records] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert [r.valid is not None for r in records] == [False] * 5 + [True]
    *steps, valid = history(tmp_path)
    assert [(line["step"], line["loss"]) for line in steps] == [(r.step, r.loss) for r in records]
    assert valid["valid"] == records[-1].valid


@pytest.mark.law
def test_loss_gradient_and_clipped_update_are_those_of_the_model(tmp_path):
    """The first step against a forward and backward pass by hand."""
    cfg = config("training.optimizer=sgd", "training.lr=1", "training.grad_clip=1e-3")
    model = DiffusionBufferModel(cfg)
    twin = copy.deepcopy(model)
    record = fit(cfg, tmp_path, steps=1, model=model)[0]
    indices = EpochPlan(7, 2, 1, 1, seed=0).batches(0, 0)[0]
    mix, target = map(torch.stack, zip(*(Clips()[i] for i in indices), strict=True))
    cpu = torch.device("cpu")
    loss = twin(mix, target, generator=example_generators([(0, 0), (0, 1)], 0, Stream.EXAMPLE, cpu))
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert record.grad_norm > 1e-3  # measured before clipping
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q - p, 1e-3 / norm * q.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.law
def test_averaged_weights_follow_their_formula(tmp_path):
    cfg = config("training.ema_momentum=0.7")
    model = DiffusionBufferModel(cfg)
    expected, (name, parameter) = None, next(model.named_parameters())
    for _ in train(cfg, Clips(), None, tmp_path, device="cpu", model=model):
        value = parameter.detach().clone()
        expected = value if expected is None else 0.7 * expected + 0.3 * value
    averaged = load_weights(tmp_path / "checkpoints" / "last.pt")[name]
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averaged, value)
    exported = DiffusionBufferModel.from_pretrained(tmp_path / "model")
    assert torch.equal(dict(exported.named_parameters())[name], averaged)


@pytest.mark.law
def test_noise_of_an_example_depends_on_its_position_only():
    plan, cpu = EpochPlan(12, 4, 1, 1, seed=5), torch.device("cpu")
    assert plan.order(3) != plan.order(4)
    both, alone = (
        [torch.randn(3, generator=g) for g in example_generators(keys, 5, Stream.EXAMPLE, cpu)]
        for keys in ([(3, 0), (3, 2)], [(3, 2)])
    )
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(*both)
    assert stream_seed(5, Stream.EXAMPLE, 3, 0) != stream_seed(5, Stream.STEP, 3, 0)


@pytest.mark.law
@pytest.mark.parametrize(
    ("size", "batch", "processes"), [(7, 2, 1), (8, 2, 2), (3, 4, 1), (1, 4, 3)]
)
def test_every_process_has_equal_batches(size, batch, processes):
    plan = EpochPlan(size, batch, 1, processes, seed=0)
    shares = [plan.batches(0, rank) for rank in range(processes)]
    assert len({tuple(map(len, share)) for share in shares}) == 1
    seen = [i for share in shares for b in share for i in b]
    if size >= batch * processes:
        assert len(seen) == len(set(seen)) == size - size % (batch * processes)
    else:
        assert set(seen) == set(range(size))


@pytest.mark.law
def test_plateau_lowers_the_learning_rate_and_early_stopping_ends(tmp_path):
    """A loss that never falls, because the steps are too small to change a thing."""
    cfg = config(
        "training.ema_momentum=0", "training.lr=1e-30", "training.metric_for_scheduler=loss",
        "training.patience=1", "training.reduce_factor=0.1", "training.early_stopping=4",
        "training.num_epochs=50",
    )  # fmt: skip
    records = fit(cfg, tmp_path)
    # Epoch 0 is the best; 1 is borne, 2 lowers the rate, 4 lowers it again and is the last.
    assert records[-1].epoch == 4
    rates = {r.epoch: r.lr for r in records}
    assert [rates[e] / 1e-30 for e in range(5)] == pytest.approx([1, 1, 1, 0.1, 0.1])
    assert last(tmp_path)["bad_validations"] == 4
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"] == 3
    assert fit(cfg, tmp_path, resume=True) == []


def scored(cfg, model, clips):
    return validate(cfg, model, clips, make_accelerator(cfg.training, "cpu")).values


@pytest.mark.law
def test_validation_does_not_depend_on_the_batch_size():
    model = DiffusionBufferModel(config())
    settings = [f"training.batch_size={size}" for size in (1, 3)]
    values = [scored(config(s, "training.valid_clips=3"), model, Clips(5)) for s in settings]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert values[0]["si_sdr_clips"] == 3


@pytest.mark.law
def test_validation_scores_the_averaged_weights(tmp_path):
    cfg, model = config("training.num_epochs=1", "training.lr=0.01"), DiffusionBufferModel(config())
    valid = fit(cfg, tmp_path, model=model)[-1].valid
    averaged = DiffusionBufferModel.from_pretrained(tmp_path / "model")
    assert scored(cfg, averaged, Clips(3, seed=1)) == pytest.approx(valid)
    assert scored(cfg, model, Clips(3, seed=1))["loss"] != valid["loss"]


def test_a_validation_before_the_first_step_changes_nothing(tmp_path):
    first, *rest = fit(config(), tmp_path / "a", pre_valid=True)
    plain = fit(config(), tmp_path / "b")
    assert first.step == 0
    assert first.valid is not None
    assert [r.loss for r in rest] == [r.loss for r in plain]
    assert_same_state(tmp_path / "a", tmp_path / "b")
    assert history(tmp_path / "a")[1:] == history(tmp_path / "b")


def test_unscorable_validation_decides_nothing(tmp_path):
    class Silent(Clips):
        def __getitem__(self, index):
            mix, target = super().__getitem__(index)
            return mix, 0 * target

    with pytest.warns(UserWarning, match="no validation clip has a finite si_sdr"):
        records = fit(config("training.num_epochs=1"), tmp_path, valid_set=Silent(3))
    assert records[-1].valid["si_sdr_clips"] == 0
    assert last(tmp_path)["best"] is None
    assert history(tmp_path)[-1]["valid"]["si_sdr"] is None
    assert (tmp_path / "model").is_dir()


@pytest.mark.law
def test_exploded_weights_are_not_saved(tmp_path):
    cfg = config("training.lr=1e38", "training.optimizer=sgd", "training.checkpoint_every=1")
    with pytest.raises(NonFiniteError, match=r"weights are not finite .* training\.lr"):
        fit(cfg, tmp_path, valid_set=None, model=scaled(cfg, 1e9))
    assert last(tmp_path)["step"] == 0
    assert all(v.isfinite().all() for v in last(tmp_path)["model"].values())


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_clip_is_named(tmp_path, workers):
    cfg = config(f"training.num_workers={workers}")
    refused(lambda: fit(cfg, tmp_path, train_set=Clips(0)), "no clip")
    refused(lambda: fit(cfg, tmp_path, train_set=Clips(broken=[2])), "clip_002.wav: the header")
    with pytest.raises(DataError, match=r"clip_\d+\.wav: KeyError: 0") as caught:
        fit(cfg, tmp_path, train_set=Clips(on_read=lambda index: {}[0]), resume=True)
    assert "on_read" in caught.value.__notes__[0]


def test_missing_gpu_is_one_warning(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    cfg = config("training.use_amp=true", "training.num_steps=1")
    for device in ("cuda:0", "auto"):
        with pytest.warns(UserWarning, match="on the CPU in float32") as caught:
            assert len(list(train(cfg, Clips(), None, tmp_path / device, device=device))) == 1
        assert len(caught) == 1
    refused(lambda: next(train(cfg, Clips(), None, tmp_path / "x", device="0")), "none of auto")


def test_overfitting_sees_the_same_batches_in_every_epoch_and_validates_on_them(tmp_path):
    clips, seen = Clips(), []
    cfg = config("training.overfit_batches=1", "training.valid_every=2")
    fit(cfg, tmp_path, train_set=clips, valid_set=None, model=Hooked(cfg, before=seen.append))
    training = [mix for mix in seen if len(mix) == 2]
    assert len(training) >= 6, "an epoch has its usual steps"
    assert all(torch.equal(mix, training[0]) for mix in training)
    assert set(clips.read) == {0, 1}
    assert [line["step"] for line in history(tmp_path) if "valid" in line] == [6]


@pytest.fixture
def scaler(monkeypatch):
    """Let runs have accelerate's fp16 with a scaler of a chosen first scale."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def choose(init_scale):
        def make(training, device):
            AcceleratorState._reset_state(True)
            accelerator = Accelerator(cpu=True, mixed_precision="fp16")
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
            return accelerator

        monkeypatch.setattr(run_module, "make_accelerator", make)

    return choose


@pytest.mark.law
def test_overflow_skips_a_step_and_lowers_the_scale_which_resume_keeps(tmp_path, scaler):
    scaler(2.0**40)
    cfg, model = config("training.num_epochs=12"), DiffusionBufferModel(config())
    before = copy.deepcopy(model)
    records = fit(cfg, tmp_path / "a", steps=2, model=model)
    assert [r.skipped for r in records] == [True, True]
    assert same(dict(model.state_dict()), dict(before.state_dict()))
    state = last(tmp_path / "a")
    assert state["scaler"]["scale"] == 2.0**38
    assert state["ema"]["n_averaged"] == 0
    scaler(2.0**10)
    record = fit(cfg, tmp_path / "a", resume=True, model=model)[-1]
    assert not record.skipped
    assert not same(dict(model.state_dict()), dict(before.state_dict()))
    assert 0 < record.grad_norm < 1e3  # of the gradient, not of the scaled one
    scaler(2.0**40)
    fit(cfg, tmp_path / "b", model=before)
    assert_same_state(tmp_path / "a", tmp_path / "b")
    assert same(last(tmp_path / "a")["scaler"], last(tmp_path / "b")["scaler"])


def test_endless_overflow_and_a_nan_loss_are_errors(tmp_path, scaler):
    def steep(loss):  # finite, of an infinite slope
        return loss + 0 * next(model.parameters()).abs().sum().mul(0).sqrt()

    scaler(4.0)
    model = Hooked(config(), after=steep)
    with pytest.raises(NonFiniteError, match=r"step 3 .*loss scale 0\.5"):
        fit(config(), tmp_path, valid_set=None, model=model)
    assert last(tmp_path)["step"] == 0
    clips = Clips(bad=range(7))
    with pytest.raises(NonFiniteError, match=r"loss is nan.*fp16, loss scale 4"):
        fit(config(), tmp_path, valid_set=None, train_set=clips, resume=True)


def test_fp16_overflow_is_finite_in_float32(tmp_path, scaler):
    """Real float16 arithmetic, under autocast on the CPU: 65504 is exceeded in the network."""
    scaler(4.0)
    model = DiffusionBufferModel(config())
    torch.nn.init.constant_(model.network.layers[0].weight, 3e4)
    torch.nn.init.constant_(model.network.last.weight, 1e-9)
    with pytest.raises(NonFiniteError, match=r"mixed precision fp16.*First bad value: stage score"):
        fit(config(), tmp_path, valid_set=None, model=model)
    capsule = Capsule.load(next(tmp_path.glob("capsule_*")))
    assert capsule.record.precision == "fp16"
    result = capsule.replay()
    assert result.same_numbers
    assert (result.finding.kind, result.finding.name) == ("module", "network.layers.0")
    assert "training.use_amp=false" in result.advice
