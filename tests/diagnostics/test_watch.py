"""Statistics against numpy; watching leaves nothing behind; recording changes nothing."""

import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from diffbuf_lib.config import build_config
from diffbuf_lib.diagnostics import gradient_statistics, score_statistics, watch_modules
from diffbuf_lib.diagnostics.watch import RecordingModel
from diffbuf_lib.trace import summarise
from diffbuf_lib.training import train
from diffbuf_lib.training.memory import estimate_step, saved_bytes, step_memory
from tests.conftest import TINY, make_model, seeded
from tests.training.helpers import Clips


@pytest.fixture
def batch():
    generator = seeded(3)
    return tuple(0.1 * torch.randn(2, 3, 1, 1600, generator=generator))


@pytest.fixture
def model():
    return make_model(build_config(TINY))


@pytest.mark.law
@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5, generator=seeded()),
        torch.randn(3, 5, generator=seeded(), dtype=torch.complex64),
        torch.tensor([0.0, -2.0, torch.nan, torch.inf, -torch.inf, 3.0]),
        torch.tensor([complex(3, 4), complex(torch.nan, 1), complex(1, torch.inf), 0]),
        torch.tensor(2.5),
        torch.tensor([1, 0, -7]),
        torch.tensor([True, False]),
        torch.randn(50, generator=seeded()).half() * 3e4,
        torch.full((3,), torch.nan),
    ],
)
def test_a_summary_is_what_numpy_computes(tensor):
    (row,) = summarise({"x": tensor})
    array = tensor.numpy()
    nan, size = np.isnan(array), np.abs(array) if tensor.is_complex() else array.astype(np.float64)
    inf = np.isinf(array) & ~nan
    assert (row.name, row.shape, row.nan, row.inf) == ("x", array.shape, nan.sum(), inf.sum())
    assert row.finite == (not (nan | inf).any())
    assert row.zeros == pytest.approx((array == 0).mean())
    good = size[~nan & ~inf].astype(np.float64)
    if not good.size:
        assert np.isnan([row.min, row.max, row.mean, row.std]).all()
        assert row.to_dict()["mean"] is None
        return
    expected = [good.min(), good.max(), good.mean(), good.std()]
    assert [row.min, row.max, row.mean, row.std] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.law
def test_score_statistics_are_what_loops_compute(model, batch):
    got = score_statistics(model, [batch, batch], time_bins=3, bands=5, seed=4)
    generator, edges, cells = seeded(4), np.linspace(0.03, 0.8, 4), defaultdict(list)
    with torch.no_grad():
        for _ in range(2):
            trace = model.eval().trace(*batch, generator)
            for b, f, k in np.ndindex(*trace.score.shape):
                time = min(int(np.searchsorted(edges, float(trace.t[b, k]), "right")) - 1, 2)
                stages = (trace.target_score, trace.score, trace.loss_map)
                numbers = tuple(complex(stage[b, f, k]) for stage in stages)
                cells[max(time, 0), f * 5 // 32].append(numbers)
    for i, j in np.ndindex(3, 5):
        target, score, loss = np.array(cells[i, j]).T
        row = got.grid[i][j]
        assert row.count == len(loss)
        assert row.target_rms == pytest.approx(np.sqrt((abs(target) ** 2).mean()), rel=1e-4)
        assert row.score_rms == pytest.approx(np.sqrt((abs(score) ** 2).mean()), rel=1e-4)
        assert row.loss == pytest.approx(loss.real.mean(), rel=1e-4)
        product = (score * target.conj()).real.sum()
        size = np.sqrt((abs(score) ** 2).sum() * (abs(target) ** 2).sum())
        assert row.correlation == pytest.approx(product / size, abs=1e-4)
    for rows in (got.by_time, got.by_band):
        assert sum(row.count for row in rows) == 2 * 3 * 32 * 4
    assert (got.bands[0], got.bands[-1]) == (0, 8000)
    assert got.times == pytest.approx(edges)
    sizes = [row.target_rms for row in got.by_time]
    assert sizes == sorted(sizes, reverse=True)  # 1 / sigma falls as t rises


@pytest.mark.law
def test_score_statistics_repeat_and_leave_mode_and_random_state(model, batch):
    model.train()
    state = torch.get_rng_state()
    one, other = (str(score_statistics(model, [batch] * 3, batches=2)) for _ in range(2))
    assert one == other
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    first, second = (score_statistics(model, [batch] * n, bands=99) for n in (1, 2))
    assert len(first.by_band) == 32
    assert 2 * first.by_band[0].count == second.by_band[0].count


@pytest.mark.law
def test_gradient_statistics_are_what_numpy_computes(model, batch):
    model(*batch, seeded()).backward()
    rows = gradient_statistics(model)
    assert {row.module for row in rows} == {
        name for name, module in model.named_modules() if list(module.parameters(recurse=False))
    }
    for row in rows:
        own = list(model.get_submodule(row.module).parameters(recurse=False))
        flat = np.concatenate([p.grad.numpy().ravel() for p in own]).astype(np.float64)
        assert row.parameters == flat.size
        assert row.norm == pytest.approx(np.sqrt((flat**2).sum()), rel=1e-5)
        assert row.max == pytest.approx(abs(flat).max())
        assert row.zeros == pytest.approx((flat == 0).mean())
        assert (row.nonfinite, row.missing) == (0, 0)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert rows.norm == pytest.approx(float(total), rel=1e-5)


def test_missing_and_non_finite_gradients_are_counted(model, batch):
    assert all(row.parameters == 0 and row.missing > 0 for row in gradient_statistics(model))
    model(*batch, seeded()).backward()
    layer = model.network.first
    layer.weight.grad[0, 0, 0] = torch.tensor([torch.nan, torch.inf, 0])
    layer.bias.grad = None
    (row,) = [row for row in gradient_statistics(model) if row.module == "network.first"]
    assert (row.nonfinite, row.missing) == (2, layer.bias.numel())
    assert row.zeros > 0


def hooks(model: nn.Module) -> int:
    lists = ({k: v for k, v in vars(m).items() if "_hooks" in k} for m in model.modules())
    return sum(len(found) for each in lists for found in each.values() if isinstance(found, dict))


@pytest.mark.law
@pytest.mark.parametrize("statistics", [True, False])
def test_a_nan_in_a_weight_names_its_module_and_hooks_are_gone(model, batch, statistics):
    mix, target = batch[0].clone(), batch[1]
    mix[0, 0, 3] = torch.inf
    before = hooks(model)
    with watch_modules(model, statistics=statistics) as watch:
        model(mix, target, seeded())
    assert watch.inputs_were_finite is False  # it came from outside
    with torch.no_grad():
        model.network.layers[0].weight[0, 0, 0, 0] = torch.nan
    with watch_modules(model, statistics=statistics) as watch:
        assert hooks(model) > before
        model(*batch, seeded())
    assert watch.first_nonfinite == "network.layers.0"
    assert watch.inputs_were_finite is True
    assert hooks(model) == before
    with pytest.raises(ZeroDivisionError), watch_modules(model):  # after an error too
        raise ZeroDivisionError
    assert hooks(model) == before


@pytest.mark.law
def test_watching_changes_no_number_and_sums_up_every_output(model, batch):
    plain, outputs = model(*batch, seeded()), []
    with watch_modules(model) as watch:
        assert torch.equal(model(*batch, seeded()), plain)
        model.network.first.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
        model(*batch, seeded())
    assert watch.first_nonfinite is None
    assert watch.calls["network.first"] == 2
    row = watch.outputs["network.first"]
    assert row.shape == tuple(outputs[0].shape)
    assert row.std == pytest.approx(outputs[0].std(correction=0).item(), rel=1e-5)
    assert set(watch.calls) >= {"DiffusionBufferModel", "network", "network.last"}


@pytest.mark.law
def test_saved_bytes_are_those_of_the_tensors_that_a_backward_pass_needs():
    layer = nn.Linear(10, 20, bias=False)
    x = torch.randn(8, 10)
    with saved_bytes(layer) as saved:
        y = layer(x).tanh()
        z = y.square()  # y is saved by both tanh and square, and counted once
    assert saved.total == 4 * (8 * 10 + 8 * 20)
    assert saved.largest == 4 * 8 * 20
    z.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.law
def test_memory_grows_linearly_with_the_batch(model, batch):
    saved = []
    for size in (1, 2, 3):
        with saved_bytes(model) as count:
            loss = model(batch[0][:size], batch[1][:size], seeded())
        saved.append(count)
        assert loss.requires_grad
    needed = step_memory(model, "adam", saved[0])
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert needed.fixed >= 5 * weights  # weights, gradients, average, two of Adam's
    assert needed.total(3) - needed.total(2) == needed.per_clip
    predicted = saved[0].total + 2 * (saved[1].total - saved[0].total)
    assert predicted == pytest.approx(saved[2].total, rel=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its shape rules
        assert estimate_step(model.cfg).total(1) == pytest.approx(needed.total(1), rel=0.25)
    for free in (0, needed.total(1) - 1, needed.total(1), needed.total(7), 10**9):
        fits = needed.largest_batch(free)
        assert fits == 0 or needed.total(fits) <= free
        assert needed.total(fits + 1) > free


RUN = build_config(TINY, ["training.num_epochs=2", "training.valid_clips=1"])


def run(path, model=None):
    records, clips = [], Clips(4, length=1600)
    for record in train(RUN, clips, clips, path, device="cpu", model=model):
        records.append((record.loss, record.grad_norm, record.valid))
        if model is not None:
            model.report(record.step)
    return records


@pytest.mark.law
def test_recording_shows_what_trains_and_changes_nothing(tmp_path):
    said: list[str] = []
    seen: list[float] = []
    board = tmp_path / "watched" / "tensorboard" / "stats"

    class Counting(RecordingModel):
        def trace(self, *args, **kwargs):
            before, trace = self.last, super().trace(*args, **kwargs)
            if self.last is not before:
                seen.append(float(self.last.loss))
                assert not self.last.loss.requires_grad
            return trace

    model = Counting(RUN, said.append, shapes=True, every=2, board=board)
    watched = run(tmp_path / "watched", model)
    model.close()
    assert watched == run(tmp_path / "plain")
    assert seen == pytest.approx([loss for loss, _, _ in watched])  # and none of validation
    assert len(seen) == 4
    shapes, *steps = said
    for part in ("2x1x1600", "2x32x51", "complex64"):
        assert part in shapes
    assert [text.partition("\n")[0] for text in steps] == ["step 2", "step 4"]
    points = EventAccumulator(str(board))
    points.Reload()
    assert [event.step for event in points.Scalars("stats/V/std")] == [2, 4]
    assert [event.value for event in points.Scalars("stats/loss/mean")] == pytest.approx(seen[1::2])
