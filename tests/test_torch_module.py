"""Any torch module as a workload: what is exchanged, where it lies, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy, mse_loss  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from dlion.cut import frozen  # noqa: E402
from dlion.learn.models import Mlp  # noqa: E402
from dlion.learn.optimizers import AdamW, Plain, Sgd  # noqa: E402
from dlion.learn.schedules import Constant  # noqa: E402
from dlion.learn.trainer import Trainer  # noqa: E402
from dlion.learn.workload import Workload  # noqa: E402
from dlion.learn.workloads.torch_memory import Staged, alias  # noqa: E402
from dlion.learn.workloads.torch_module import TorchData, TorchWorkload  # noqa: E402
from dlion.learn.workloads.torch_precision import LossScale  # noqa: E402
from dlion.tensors import Flat  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
FEATURES, CLASSES, SAMPLES = 6, 4, 48


def classes(seed: int = 0) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, FEATURES, generator=draw)
    return TensorDataset(inputs, (inputs[:, :CLASSES] + 0.1).argmax(1))


def workload(factory: Callable[[], nn.Module], optimizer: Any = None, **options: Any) -> TorchWorkload:
    return TorchWorkload(factory, cross_entropy, TorchData(classes(), classes(1)), optimizer, **options)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def snapshot(subject: Workload, seed: int = 1) -> Flat:
    """As the node gives it: may not be written."""
    weights = subject.initial(seed).flat
    weights.flags.writeable = False
    return weights


def gradient(subject: TorchWorkload, weights: Flat, batch: int = 8) -> tuple[float, Flat]:
    out = np.full(subject.layout.size, np.nan, dtype=np.float32)
    return subject.gradient(weights, np.arange(batch), out), out


BATCH = np.arange(8)


def reference(module: nn.Module, subject: TorchWorkload, weights: Flat) -> Flat:
    """The same gradient by plain torch: the weights loaded by name, a backward, the gradients packed by name."""
    values = {name: torch.from_numpy(view.copy()) for name, view in subject.layout.views(weights.copy()).items()}
    module.load_state_dict(values, strict=False)
    inputs, targets = classes()[:8]
    cross_entropy(module(inputs), targets).backward()
    named = dict(module.named_parameters())
    pieces = [named[n].grad if named[n].grad is not None else torch.zeros(s) for n, s in _described(subject)]
    return torch.cat([piece.reshape(-1) for piece in pieces]).numpy()


def _described(subject: TorchWorkload) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(subject.layout.names, subject.layout.shapes, strict=True))


def test_equal_to_the_numpy_mlp() -> None:
    """Equal weights and batches give equal losses and gradients to 1e-5: two independent implementations agree."""
    subject, other = workload(mlp), Mlp((FEATURES, 5, CLASSES))
    weights = snapshot(subject)
    views = subject.layout.views(weights.copy())
    mine = np.concatenate([v.T.ravel() if v.ndim == 2 else v for v in views.values()])
    inputs, targets = (t.numpy() for t in classes()[:8])
    expected = np.empty_like(mine)
    expected_loss = other.gradient(mine, inputs, targets, expected)
    loss, out = gradient(subject, weights)
    got = np.concatenate([v.T.ravel() if v.ndim == 2 else v for v in subject.layout.views(out).values()])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert loss == pytest.approx(expected_loss, abs=1e-5)


def test_a_gradient_is_taken_in_slices_where_that_is_the_same_gradient() -> None:
    def normalised() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))

    def divisible(subject: TorchWorkload) -> bool:
        return Trainer(subject, subject.optimizer(Sgd()), Constant(0.1), 1).divisible

    assert divisible(workload(mlp))
    assert not divisible(workload(normalised))
    assert not divisible(workload(mlp, lambda module: torch.optim.SGD(module.parameters(), lr=0.1)))


def test_same_run_through_the_same_trainer_as_the_numpy_mlp() -> None:
    """Fifty steps of momentum SGD by the trainer, data in the same order: weights still agree to 1e-5."""

    class NumpyMlp:
        train_size = global_train_size = SAMPLES
        model = Mlp((FEATURES, 5, CLASSES))
        layout = model.layout

        def gradient(self, weights: Flat, batch: Any, out: Flat) -> float:
            inputs, targets = (t.numpy() for t in classes()[batch])
            return self.model.gradient(weights, inputs, targets, out)

    subject = workload(mlp)
    ours = subject.initial(3).flat
    theirs = np.concatenate([v.T.ravel() if v.ndim == 2 else v for v in subject.layout.views(ours.copy()).values()])
    untrained = subject.evaluate(ours).loss
    for flat, learner in ((ours, subject), (theirs, NumpyMlp())):
        trainer = Trainer(learner, Sgd(momentum=0.9), Constant(0.1), rng_seed=5)  # type: ignore[arg-type]
        for _ in range(50):
            np.add(flat, trainer.step(flat.copy(), 8, 0.0).values, out=flat)
    trained = [v.T.ravel() if v.ndim == 2 else v for v in subject.layout.views(ours).values()]
    np.testing.assert_allclose(np.concatenate(trained), theirs, atol=1e-5)
    assert subject.evaluate(ours).loss < 0.7 * untrained


def test_nothing_is_copied_on_the_processor() -> None:
    """During the step the parameters lie in the snapshot and their gradients in ``out``."""
    seen: list[tuple[int, int]] = []

    class Spy(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert self.weight.grad is not None
            seen.append((self.weight.data_ptr(), self.weight.grad.data_ptr()))
            return super().forward(inputs)

    subject = workload(lambda: Spy(FEATURES, CLASSES))
    weights, out = snapshot(subject), np.ones(FEATURES * CLASSES + CLASSES, dtype=np.float32)
    before = weights.copy()
    subject.gradient(weights, BATCH, out)
    assert seen == [(weights.ctypes.data, out.ctypes.data)]
    np.testing.assert_array_equal(weights, before)
    other = before.copy()
    subject.gradient(other, BATCH, out)
    assert seen[1][0] == other.ctypes.data
    assert subject.module.weight.grad is None, "the module would keep a strategy's buffer alive"


def test_initial_values_depend_on_the_seed_alone() -> None:
    first, second = workload(mlp), workload(mlp)
    torch.manual_seed(9)
    a = first.initial(4).flat
    torch.manual_seed(10)
    drawn = torch.rand(1)
    torch.manual_seed(10)
    b = second.initial(4).flat
    np.testing.assert_array_equal(a, b)
    assert torch.rand(1) == drawn, "the user's generator must not move"
    assert not np.array_equal(a, second.initial(5).flat)
    assert first.layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")


class Tied(nn.Module):
    """Three layers of which two share a matrix, one is frozen; one parameter is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.second(torch.tanh(self.first(inputs)))))


def test_tied_once_frozen_left_out_unused_zero() -> None:
    subject = workload(Tied)
    assert subject.layout.names == ("unused", "first.weight", "first.bias", "second.bias", "head.weight", "head.bias")
    weights = snapshot(subject)
    _, out = gradient(subject, weights)
    views = subject.layout.views(out)
    assert not views["unused"].any()
    assert views["first.weight"].any()
    module = Tied()
    module.frozen.load_state_dict(subject.module.frozen.state_dict())
    np.testing.assert_allclose(out, reference(module, subject, weights), atol=1e-6)
    assert subject.module.second.weight.data_ptr() == subject.module.first.weight.data_ptr()


def test_frozen_parameters_are_equal_on_all_peers_and_never_move() -> None:
    one, two = workload(Tied), workload(Tied)
    torch.manual_seed(1)
    weights = snapshot(one, 7)
    torch.manual_seed(2)
    np.testing.assert_array_equal(snapshot(two, 7), weights)
    before = one.state_dict(weights)["frozen.weight"]
    np.testing.assert_array_equal(before, two.state_dict(weights)["frozen.weight"])
    gradient(one, weights)
    np.testing.assert_array_equal(one.state_dict(weights)["frozen.weight"], before)


def test_state_dict_loads_into_a_plain_module() -> None:
    subject = workload(Tied)
    weights = snapshot(subject)
    module = Tied()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in subject.state_dict(weights).items()})
    inputs, targets = classes(1)[:]
    assert subject.evaluate(weights).loss == pytest.approx(cross_entropy(module(inputs), targets).item(), rel=1e-5)


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))


def test_batchnorm_statistics_stay_local_by_default() -> None:
    one, two = workload(norm), workload(norm)
    weights = snapshot(one)
    two.initial(1)
    assert not any("running" in name for name in one.layout.names)
    _, out = gradient(one, weights, 8)
    np.testing.assert_allclose(out, reference(norm(), one, weights), atol=1e-6)
    gradient(two, weights, 16)
    assert not torch.equal(one.module[1].running_mean, two.module[1].running_mean)
    two.restore(one.state())
    assert torch.equal(one.module[1].running_mean, two.module[1].running_mean)
    assert two.module[1].num_batches_tracked == 1


def test_averaged_batchnorm_statistics_are_the_mean_of_what_peers_saw() -> None:
    """Each peer moves the common statistics by its batch; the mean of the updates is the mean of the moved ones."""
    subjects = [workload(norm, buffers="averaged") for _ in range(2)]
    assert subjects[0].layout.names[-2:] == ("1.running_mean", "1.running_var")
    weights = snapshot(subjects[0])
    common = weights.copy()
    local = []
    for number, subject in enumerate(subjects):
        subject.initial(1)
        optimizer = subject.optimizer(AdamW())
        out = np.empty_like(common)
        subject.gradient(weights, np.arange(8 * number, 8 * number + 8), out)
        local.append(subject.module[1].running_var.numpy().copy())
        common += optimizer.step(out, weights, 0.01) / 2
    np.testing.assert_allclose(subjects[0].layout.views(common)["1.running_var"], np.mean(local, axis=0), rtol=1e-5)
    assert not np.array_equal(local[0], local[1])
    subjects[0].evaluate(common)
    np.testing.assert_array_equal(
        subjects[0].module[1].running_var.numpy(), subjects[0].layout.views(common)["1.running_var"]
    )


def test_evaluation_leaves_the_modes_of_layers_as_they_were() -> None:
    def factory() -> nn.Module:
        module = norm()
        module[1].eval()
        return module

    subject = workload(factory)
    weights = snapshot(subject)
    subject.evaluate(weights)
    assert [part.training for part in subject.module] == [True, False, True]
    mean = subject.module[1].running_mean.clone()
    gradient(subject, weights)
    assert torch.equal(subject.module[1].running_mean, mean)


def test_evaluation_in_another_thread_waits_its_turn() -> None:
    """The module is one; a step's gradient is not disturbed by an evaluation of other weights beside it."""
    subject = workload(mlp)
    weights, others = snapshot(subject), np.zeros(subject.layout.size, dtype=np.float32)
    alone, judged = gradient(subject, weights)[1], subject.evaluate(others)
    with ThreadPoolExecutor(1) as second:
        for _ in range(50):
            beside = second.submit(subject.evaluate, others)
            np.testing.assert_array_equal(gradient(subject, weights)[1], alone)
            assert beside.result() == judged


def test_a_data_set_that_gathers_is_asked_for_whole_batches() -> None:
    class Gathering(TensorDataset):
        asked = 0

        def gather(self, indices: Any) -> Any:
            self.asked += 1
            return self[indices]

    data = Gathering(*classes().tensors)
    subject = TorchWorkload(mlp, cross_entropy, TorchData(data, data))
    weights = snapshot(subject)
    one_by_one = gradient(workload(mlp), weights)
    loss, out = gradient(subject, weights)
    assert data.asked == 1 and loss == one_by_one[0]
    np.testing.assert_array_equal(out, one_by_one[1])


def test_evaluation_counts_right_answers_and_obeys_its_limit() -> None:
    subject = workload(mlp)
    weights = snapshot(subject)
    inputs, targets = classes(1)[:7]
    outputs = subject.module(inputs)
    found = subject.evaluate(weights, 7)
    assert found.samples == 7
    assert found.accuracy == pytest.approx(float((outputs.argmax(1) == targets).float().mean()))
    assert found.loss == pytest.approx(cross_entropy(outputs, targets).item(), rel=1e-5)
    assert subject.evaluate(weights).samples == subject.evaluate(weights, 1000).samples == SAMPLES


def test_regression_needs_its_own_figure_of_merit() -> None:
    inputs = torch.randn(8, 2)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))

    class Regression(TorchWorkload):
        def right(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
            return float(((outputs - targets).abs() < 0.5).float().mean())

    plain = TorchWorkload(lambda: nn.Linear(2, 1), mse_loss, TorchData(data, data))
    with pytest.raises(ValueError, match=r"override TorchWorkload\.right"):
        plain.evaluate(plain.initial(0).flat)
    own = Regression(lambda: nn.Linear(2, 1), mse_loss, TorchData(data, data))
    assert 0 <= own.evaluate(own.initial(0).flat).accuracy <= 1


def groups(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": module[0].parameters(), "lr": 0.1, "weight_decay": 0.5},
            {"params": module[2].parameters(), "lr": 0.01, "betas": (0.8, 0.9)},
        ]
    )


def scheduled(module: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize("factory", [groups, scheduled])
def test_the_users_optimizer_makes_the_run_it_makes_in_plain_torch(factory: Any) -> None:
    """Groups keep their settings, the scheduler is stepped; five steps through the trainer equal torch's own loop."""
    subject = workload(mlp, factory)
    trainer = Trainer(subject, subject.optimizer(Sgd()), Constant(123.0), rng_seed=2)
    weights = subject.initial(1).flat
    module = mlp()
    module.load_state_dict({name: torch.from_numpy(a) for name, a in subject.state_dict(weights).items()})
    made = factory(module)
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    order = Trainer(subject, Sgd(), Constant(0.0), rng_seed=2)._order
    for _ in range(5):
        before = weights.copy()
        weights += trainer.step(before, 8, 0.0).values
        inputs, targets = classes()[order.take(8)]
        optimizer.zero_grad()
        cross_entropy(module(inputs), targets).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    expected = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy()
    np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("factory", [groups, scheduled])
def test_a_restored_optimizer_goes_on_bit_by_bit(factory: Any) -> None:
    def steps(learner: tuple[TorchWorkload, Trainer], weights: Flat, count: int) -> None:
        for _ in range(count):
            weights += learner[1].step(weights.copy(), 8, 0.0).values

    def fresh() -> tuple[TorchWorkload, Trainer]:
        subject = workload(dropout, factory)
        return subject, Trainer(subject, subject.optimizer(Sgd()), Constant(0.1), rng_seed=2)

    first = fresh()
    weights = first[0].initial(1).flat
    steps(first, weights, 3)
    saved, state = weights.copy(), frozen(first[1].state())
    steps(first, weights, 3)
    second = fresh()
    second[1].restore(state)
    steps(second, saved, 3)
    np.testing.assert_array_equal(saved, weights)


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Dropout(0.5), nn.Linear(5, CLASSES))


def test_random_layers_draw_from_a_stream_of_their_own() -> None:
    def draws(shard: int, disturb: bool) -> list[float]:
        subject = TorchWorkload(dropout, cross_entropy, TorchData(classes(), classes(), shard=shard))
        weights = snapshot(subject)
        losses = []
        for _ in range(3):
            losses.append(gradient(subject, weights)[0])
            if disturb:
                torch.rand(1)
        return losses

    assert draws(0, False) == draws(0, True)
    assert len(set(draws(0, False))) == 3
    assert draws(0, False) != draws(1, False)


class Restless(nn.Module):
    """Does ``what`` to itself in its second forward."""

    def __init__(self, what: Callable[[Restless], None]) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.what, self.calls = what, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        outputs = self.layer(inputs)
        if self.calls == 2:
            self.what(self)
        return outputs


def grow(module: Restless) -> None:
    module.extra = nn.Parameter(torch.zeros(2))


def freeze(module: Restless) -> None:
    module.layer.bias.requires_grad_(False)


def widen(module: Restless) -> None:
    module.layer = nn.Linear(FEATURES, CLASSES + 1)


def replace(module: Restless) -> None:
    module.layer.bias = nn.Parameter(torch.zeros(CLASSES))


def move(module: Restless) -> None:
    module.layer.bias.data = torch.zeros(CLASSES)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (grow, r"appeared: \['extra'\]"),
        (freeze, r"gone: \['layer.bias'\]"),
        (widen, r"'layer.weight' was \(4, 6\) and is \(5, 6\)"),
        (replace, "'layer.bias' is another object"),
        (move, "memory of 'layer.bias' was replaced"),
    ],
)
def test_a_module_that_changes_its_parameters_is_refused(what: Callable[[Restless], None], said: str) -> None:
    subject = workload(lambda: Restless(what))
    weights = snapshot(subject)
    gradient(subject, weights)
    with pytest.raises(ValueError, match=said):
        gradient(subject, weights)


@pytest.mark.parametrize(
    ("factory", "options", "said"),
    [
        (lambda: nn.LazyLinear(3), {}, "no shape yet"),
        (lambda: nn.ParameterList([torch.zeros(2, dtype=torch.complex64)]), {}, "only real floating"),
        (nn.ReLU, {}, "no parameter"),
        (mlp, {"dtype": torch.float64}, "dtype must be one of"),
        (mlp, {"buffers": "shared"}, "'local' or 'averaged'"),
    ],
)
def test_what_cannot_be_trained_is_refused(factory: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        workload(factory, **options)


def test_exchanges_that_consume_gradients_are_refused_where_they_cannot_work() -> None:
    assert isinstance(workload(mlp).optimizer(Plain()), Plain)
    with pytest.raises(ValueError, match="torch optimizer"):
        workload(mlp, groups).optimizer(Plain())
    with pytest.raises(ValueError, match="averaged buffers"):
        workload(norm, buffers="averaged").optimizer(Plain())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_float32_masters(dtype: torch.dtype) -> None:
    """The step computes in ``dtype``; weights of any float32 value get a close gradient, and tiny updates survive."""
    seen: list[torch.dtype] = []

    def factory() -> nn.Module:
        module = mlp()
        module[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
        return module.to(torch.bfloat16)

    subject, exact = workload(factory, dtype=dtype), workload(mlp)
    weights = snapshot(exact)
    assert subject.initial(1).flat.dtype == np.float32
    loss, out = gradient(subject, weights)
    exact_loss, exact_out = gradient(exact, weights)
    assert seen == [dtype]
    assert loss == pytest.approx(exact_loss, rel=2e-2)
    assert np.linalg.norm(out - exact_out) < 3e-2 * np.linalg.norm(exact_out)
    assert not np.array_equal(out, exact_out)


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(8.0, grow_after=2)
    overflown = torch.tensor([1.0, float("inf")])
    scale.unscale(overflown)
    assert scale.factor == 4.0 and not overflown.any()
    for expected in (4.0, 8.0):
        fine = torch.tensor([4.0, 8.0])
        before = scale.factor
        scale.unscale(fine)
        assert scale.factor == expected
        torch.testing.assert_close(fine, torch.tensor([4.0, 8.0]) / before)


@pytest.mark.parametrize("buffers", ["local", "averaged"])
def test_the_path_of_another_device_gives_the_same_bits(buffers: Any) -> None:
    """What a GPU's step does with memory, done with buffers in the processor's."""
    shared, staged = workload(norm, buffers=buffers), workload(norm, buffers=buffers)
    staged._memory = Staged(torch.device("cpu"))
    weights = snapshot(shared)
    staged.initial(1)
    for size in (8, 16):
        assert gradient(shared, weights, size)[0] == gradient(staged, weights, size)[0]
        np.testing.assert_array_equal(gradient(shared, weights, size)[1], gradient(staged, weights, size)[1])
    assert shared.evaluate(weights) == staged.evaluate(weights)
    assert staged.module[0].weight.data_ptr() != weights.ctypes.data


def test_alias_refuses_what_has_no_flat_memory() -> None:
    with pytest.raises(ValueError, match="contiguous float32"):
        alias(np.zeros(6, dtype=np.float32)[::2])
    with pytest.raises(ValueError, match="contiguous float32"):
        alias(np.zeros(6))  # type: ignore[arg-type]
    kept = alias(np.arange(3, dtype=np.float32))
    assert kept.tolist() == [0.0, 1.0, 2.0]
    assert alias(np.zeros(0, dtype=np.float32)).numel() == 0
