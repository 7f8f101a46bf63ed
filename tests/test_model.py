"""trace is forward, alignment, online enhancement, saving, and the errors of wrong shapes."""

import pytest
import torch

from diffbuf_lib import DiffusionBufferModel
from diffbuf_lib.diffusion.buffer import perturb
from tests.conftest import make_model, refused, seeded

pytestmark = pytest.mark.law
DATA, MASK = "training.loss=data_prediction", "model.x0_output=mask"


@pytest.fixture
def batch():
    return torch.randn(2, 3, 1, 1600, generator=seeded(9)).mul(0.1).unbind(0)


def traced(cfg, batch, *overrides, seed=0):
    return make_model(cfg.override(*overrides)).trace(*batch, seeded(seed))


@pytest.mark.parametrize("loss", ["score", "weighted_score", "data_prediction"])
def test_forward_is_the_loss_of_trace(tiny_cfg, batch, loss):
    model = make_model(tiny_cfg.override(f"training.loss={loss}"))
    trace = model.trace(*batch, seeded(5))
    assert torch.equal(model(*batch, generator=seeded(5)), trace.loss)
    assert torch.equal(trace.loss, trace.loss_map.mean())
    torch.testing.assert_close(trace.target_score, -trace.z / trace.sigma[:, None])
    assert torch.equal(trace.V, perturb(trace.S, trace.Y, trace.t, trace.z, model.sde))


@pytest.mark.parametrize("loss", ["weighted_score", "data_prediction"])
def test_score_and_x0_hat_say_the_same(tiny_cfg, batch, loss):
    """score = (mean(x0_hat) - V) / sigma^2, whichever of the two the network predicts."""
    model = make_model(tiny_cfg.override(f"training.loss={loss}")).double()
    trace = model.trace(*(signal.double() for signal in batch), seeded())
    Kb = trace.t.shape[-1]
    mean = model.sde.mean(trace.x0_hat, trace.Y[..., -Kb:], trace.t)
    residual = mean - trace.V[..., -Kb:]
    torch.testing.assert_close(trace.score * trace.sigma[:, None] ** 2, residual)


def test_data_scale_gives_the_network_inputs_of_unit_size(tiny_cfg, monkeypatch):
    """For spectra of that size, in the history and at every diffusion time."""
    cfg = tiny_cfg.override("model.data_scale=0.02", "diffusion_buffer.t_eps=0.001")
    model, seen = make_model(cfg), []
    plain = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x, t: seen.append(x) or plain(x, t))
    Y = 0.02 * torch.randn(8, 32, 10, dtype=torch.complex64, generator=seeded())
    t = torch.tensor([[0.001, 0.1, 0.5, 0.8]]).expand(8, -1)
    z = torch.randn(8, 32, 4, dtype=torch.complex64, generator=seeded(1))
    model.denoise(perturb(Y, Y, t, z, model.sde), Y, t)
    power = seen[0].square().mean(dim=(0, 2))  # [4, K]
    torch.testing.assert_close(power, torch.full((4, 10), 0.5), rtol=0.3, atol=0)


def test_own_estimate_makes_v_of_what_the_network_has_put_out(tiny_cfg):
    batch = torch.randn(2, 200, 1, 800, generator=seeded()) * 0.1
    trace = traced(tiny_cfg, batch, DATA, "training.own_estimate=0.5", seed=1)
    plain = traced(tiny_cfg, batch, DATA, seed=1)
    assert not trace.V.requires_grad
    clean = (trace.V == trace.S)[..., :-4].all(dim=1).all(dim=1)
    assert 70 <= int(clean.sum()) <= 130
    assert torch.equal(plain.V[..., :-4], plain.S[..., :-4])
    torch.testing.assert_close(trace.V[clean], plain.V[clean])
    # In the others, buffer and history are of one estimate: at t = t_eps little else is left.
    assert not torch.isclose(trace.V[~clean], plain.V[~clean]).all(dim=1).any()
    assert trace.loss != trace.loss_map.mean()
    assert plain.loss == plain.loss_map.mean()


def test_own_estimate_of_a_perfect_network_changes_nothing(tiny_cfg, monkeypatch):
    """Whose first estimate is S: then V is what it is without."""
    model = make_model(tiny_cfg.override(DATA, "training.own_estimate=1"))
    batch = torch.randn(2, 2, 1, 800, generator=seeded()) * 0.1
    S = model.spectral(batch[1, :, 0])
    perfect = lambda V, Y, t, *_, **__: (V[..., -t.shape[1] :], S[..., -t.shape[1] :])  # noqa: E731
    monkeypatch.setattr(model, "denoise", perfect)
    trace = model.trace(*batch, seeded(1))
    torch.testing.assert_close(trace.V, traced(tiny_cfg, batch, DATA, seed=1).V)
    assert trace.loss == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_estimate_leaves_every_weight_its_gradient(tiny_cfg, batch, dtype):
    """The call without gradients must not leave its copies of the weights to the one with them."""
    model = make_model(tiny_cfg.override(DATA, "training.own_estimate=1"))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(*batch, seeded()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_from_noisy_shows_the_network_nothing_of_the_clean_signal(tiny_cfg):
    model = make_model(tiny_cfg.override(DATA, "training.from_noisy=true"))
    mix, *targets = torch.randn(3, 2, 1, 800, generator=seeded()) * 0.1
    one, other = (model.trace(mix, target, seeded(1)) for target in targets)
    assert torch.equal(one.V, other.V)
    assert torch.equal(one.x0_hat, other.x0_hat)
    assert one.loss != other.loss


def test_snr_weight_adds_the_error_in_decibels_of_the_linear_spectrum(tiny_cfg, batch):
    trace = traced(tiny_cfg, batch, DATA, "training.snr_weight=0.5")
    expand = make_model(tiny_cfg).spectral.expand
    clean = expand(trace.S[..., -trace.x0_hat.shape[-1] :])
    error = expand(trace.x0_hat) - clean
    ratio = error.abs().square().sum((1, 2)) / clean.abs().square().sum((1, 2))
    level = (10 * (ratio + 1e-3).log10()).mean()
    torch.testing.assert_close(trace.loss, traced(tiny_cfg, batch, DATA).loss + 0.5 * level)


def test_a_silent_clip_has_no_error_level(tiny_cfg, batch):
    model = make_model(tiny_cfg.override(DATA, "training.snr_weight=1", MASK))
    mix, target = (wave.clone() for wave in batch)
    mix[0] = target[0] = 0  # digital silence: S, Y and x0_hat are 0
    loss = model(mix, target, seeded())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("scale", ["sigma", "time", "none"])
def test_output_scale(tiny_cfg, batch, scale):
    trace = traced(tiny_cfg, batch, f"model.output_scale={scale}")
    plain = traced(tiny_cfg, batch, "model.output_scale=none")
    divisor = {"sigma": trace.sigma, "time": trace.t, "none": torch.ones_like(trace.t)}[scale]
    torch.testing.assert_close(trace.score * divisor[:, None], plain.score)


def test_a_mask_multiplies_the_noisy_spectrum(tiny_cfg, batch):
    """x0_hat = (1 + M) Y; untrained, where M is 0, the model gives its input back."""
    plain = traced(tiny_cfg, batch, DATA)
    masked = traced(tiny_cfg, batch, DATA, MASK)
    torch.testing.assert_close(masked.x0_hat, (1 + plain.x0_hat) * plain.Y[..., -4:])
    untrained = DiffusionBufferModel(tiny_cfg.override(DATA, MASK))
    torch.testing.assert_close(untrained(batch[0]), batch[0], rtol=1e-4, atol=1e-4)


def test_stereo_is_averaged_to_mono(tiny_cfg):
    model = make_model(tiny_cfg)
    stereo = torch.randn(2, 2, 1600)
    mono = stereo.mean(dim=1, keepdim=True)
    assert torch.equal(model.trace(stereo, stereo).Y, model.trace(mono, mono).Y)
    enhanced = model(stereo, generator=seeded())
    assert enhanced.shape == stereo.shape
    assert torch.equal(enhanced[:, 1:], model(mono, generator=seeded()))


def test_an_untrained_zero_network_has_the_loss_of_noise(tiny_cfg):
    """The last layer starts at zero, and E|z|^2 = 1."""
    torch.manual_seed(0)
    model = DiffusionBufferModel(tiny_cfg)
    big = torch.randn(64, 1, 1600) * 0.1
    assert model(big, big, generator=seeded()).item() == pytest.approx(1, abs=0.03)


def test_noise_of_an_example_does_not_depend_on_its_batch(tiny_cfg, batch):
    model = make_model(tiny_cfg)
    whole = model.trace(*batch, [seeded(i) for i in range(3)])
    alone = model.trace(batch[0][1:2], batch[1][1:2], [seeded(1)])
    assert torch.equal(whole.V[1:2], alone.V)
    torch.testing.assert_close(whole.loss_map[1:2], alone.loss_map)


def test_conditioning_is_the_window_of_v(tiny_cfg, monkeypatch):
    """With a network that returns nothing, V's history and Y are one stream of frames."""
    model, seen = make_model(tiny_cfg.override(DATA)), []

    def perfect(V, Y, t):
        seen.append((V.clone(), Y.clone()))
        return torch.zeros_like(Y[..., -4:]), Y[..., -4:]  # x0_hat = Y

    monkeypatch.setattr(model, "denoise", perfect)
    mix = torch.randn(1, 1, 1600)
    model.enhance(mix, seeded())
    Y = model.framing(mix[:, 0])
    for k in (0, 7, 20, 49):
        V, window = seen[k]
        expected = torch.nn.functional.pad(Y, (9, 3))[..., k : k + 10]
        torch.testing.assert_close(window, expected)
        torch.testing.assert_close(V[..., :6], expected[..., :6])  # history: the same moments


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_enhance_with_the_true_signal_returns_it(perfect_model, delay):
    mix = torch.randn(2, 1, 1597)
    torch.testing.assert_close(perfect_model.enhance(mix, delay=delay), mix, rtol=1e-4, atol=1e-4)
    assert perfect_model.enhance(mix.double()).dtype == torch.float64


def test_enhance_batches_repeats_turns_dropout_off_and_leaves_the_mode(tiny_cfg):
    model = make_model(tiny_cfg.override("model.dropout=0.5")).train()
    mix = torch.randn(2, 1, 800) * 0.1
    together = model.enhance(mix, [seeded(1), seeded(2)])
    torch.testing.assert_close(together[1:], model.enhance(mix[1:], [seeded(2)]))
    assert torch.equal(model.enhance(mix, seeded(3)), model.enhance(mix, seeded(3)))
    assert model.training
    assert model.network.training


@pytest.mark.parametrize("sde", ["{type: ouve}", "{type: bbed, diffusion: {c: 0.08}}"])
def test_save_and_load_keep_config_and_numbers(tiny_cfg, tmp_path, sde):
    model = make_model(tiny_cfg.override(f"sde={sde}"))
    model.save_pretrained(tmp_path)
    loaded = DiffusionBufferModel.from_pretrained(tmp_path)
    assert loaded.cfg == model.cfg
    mix = torch.randn(1, 1, 400)
    assert torch.equal(model(mix, generator=seeded()), loaded(mix, generator=seeded()))
    assert not list(tmp_path.glob("*.bin"))


def test_one_batch_overfits(tiny_cfg):
    """One clip with its noise: the weighted loss falls far below that of noise."""
    cfg = tiny_cfg.override("model.base_channels=16", "model.num_layers=3")
    torch.manual_seed(0)
    model = DiffusionBufferModel(cfg)
    target = torch.sin(torch.arange(1600) * 0.3)[None, None] * 0.3
    mix = target + 0.1 * torch.randn(1, 1, 1600, generator=seeded())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(mix, target, generator=seeded(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_bfloat16_autocast_keeps_sigma_and_loss_in_float32(tiny_cfg, batch):
    model = make_model(tiny_cfg)
    with torch.autocast("cpu", torch.bfloat16):
        trace = model.trace(*batch, seeded())
    assert {trace.sigma.dtype, trace.loss_map.dtype, trace.loss.dtype} == {torch.float32}
    plain = model.trace(*batch, seeded())
    assert torch.equal(trace.V, plain.V)
    assert trace.loss.item() == pytest.approx(plain.loss.item(), rel=0.05)


def test_wrong_shapes_and_delays_say_what_to_do(tiny_cfg):
    model, ok = make_model(tiny_cfg), torch.zeros(1, 1, 1600)
    for mix, target, part in [
        (ok[0], ok[0], "unsqueeze"),
        (ok, ok.expand(1, 2, -1), "mono and stereo"),
        (ok[..., :80], ok[..., :80], "buffer_size 4"),
        (ok[..., :0], ok[..., :0], "empty"),
    ]:
        refused(lambda mix=mix, target=target: model(mix, target), part)
    refused(lambda: model.sampler(delay=2), "data_prediction")
    refused(lambda: model.sampler(delay=5), "buffer_size 4")
