"""Built-in workloads: what they load, how they cut it, and what they say when they cannot."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from dlion.learn.data import DataError, read_idx
from dlion.learn.workload import WorkloadSpec
from dlion.learn.workloads import WORKLOADS, build, digits, idx

NAMES = ["a", "b", "c"]


def write_idx(path: Path, array: np.ndarray) -> None:
    code, raw = (0x08, array.astype(np.uint8)) if array.dtype == np.uint8 else (0x0C, array.astype(">i4"))
    header = bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4) for n in array.shape)
    path.write_bytes(gzip.compress(header + raw.tobytes()))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A small data set in mnist's form, in ``tmp_path/mnist``."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 40)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
        if part == "train":
            writers = np.column_stack([labels, labels * 0, np.arange(count) // 10]).astype(np.int32)
            write_idx(folder / "qmnist-train-labels-idx2-int.gz", writers)
    return tmp_path


def test_toy_has_its_optimum_at_the_share_weighted_mean_of_the_peers_targets() -> None:
    """The peers' mean gradient over all noise, weighted by their samples, vanishes where evaluate's loss does."""
    shares = [1.0, 2.0, 3.0]
    peers = [build(WorkloadSpec("toy", size=33), k, NAMES, shares) for k in range(3)]
    weights = peers[0].initial(0).flat
    total, out = np.zeros(33), np.empty(33, dtype=np.float32)
    for peer in peers:
        for sample in range(64):
            peer.gradient(weights, np.array([sample]), out)
            total += out * (peer.train_size / peer.global_train_size / 64)
    optimum = (weights - 33 * total).astype(np.float32)
    assert peers[1].evaluate(optimum).accuracy == pytest.approx(1.0, abs=1e-6)
    assert peers[1].evaluate(np.zeros(33, dtype=np.float32)).accuracy == pytest.approx(0.5)
    assert sum(p.train_size for p in peers) == peers[0].global_train_size


def test_toy_gradient_is_that_of_its_loss() -> None:
    toy = build(WorkloadSpec("toy", size=5), 0, ["a"], [1.0])
    weights, batch = toy.initial(1).flat, np.array([7, 9])
    gradient, spare = np.empty_like(weights), np.empty_like(weights)
    toy.gradient(weights, batch, gradient)
    for k in range(5):
        step = np.zeros_like(weights)
        step[k] = 1e-2
        slope = (toy.gradient(weights + step, batch, spare) - toy.gradient(weights - step, batch, spare)) / 2e-2
        assert gradient[k] == pytest.approx(slope, abs=1e-4)


def test_toy_follows_a_larger_batch_with_less_noise() -> None:
    toy = build(WorkloadSpec("toy"), 0, ["a"], [1.0])
    out = np.empty(64, dtype=np.float32)
    weights = toy.initial(0).flat

    def noise(size: int) -> float:
        draws = [(toy.gradient(weights, np.arange(k, k + size), out), out.copy())[1] for k in range(64)]
        return float(np.std(draws, axis=0).mean())

    assert noise(1) / noise(16) == pytest.approx(4.0, rel=1e-4)


def test_digits_split_is_fixed_by_the_seed_and_read_without_importing_the_library() -> None:
    pytest.importorskip("sklearn", reason="needs the data extra")
    first, again = digits.load.__wrapped__(3), digits.load.__wrapped__(3)
    assert np.array_equal(first.test_images, again.test_images)
    assert not np.array_equal(first.test_images, digits.load(4).test_images)
    assert len(first.train_labels) + len(first.test_labels) == 1797
    inputs = first.normalised(first.train_images)
    assert inputs.dtype == np.float32
    assert abs(inputs.mean()) < 1e-3
    assert inputs.std() == pytest.approx(1.0, abs=1e-3)


def test_digits_file_holds_what_the_librarys_loader_gives() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the data extra")
    pixels, labels = datasets.load_digits(return_X_y=True)
    assert np.array_equal(digits._table(), np.column_stack([pixels, labels]))


def test_digits_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"extra 'data'"):
        digits.load.__wrapped__(0)


def test_digits_has_a_few_hundred_thousand_parameters_and_takes_other_widths() -> None:
    pytest.importorskip("sklearn", reason="needs the data extra")
    assert 200_000 < build(WorkloadSpec("digits"), 0, ["a"], [1.0]).layout.size < 400_000
    assert build(WorkloadSpec("digits", hidden=()), 0, ["a"], [1.0]).layout.size == 650


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "writer"])
@pytest.mark.parametrize("inside", [False, True])
def test_images_are_found_in_the_folder_or_its_parent_and_cut(images: Path, partition: str, inside: bool) -> None:
    spec = WorkloadSpec("mnist", hidden=(8,), partition=partition, data_dir=images / "mnist" if inside else images)
    peers = [build(spec, k, NAMES, [1.0, 1.0, 2.0]) for k in range(3)]
    assert sum(p.train_size for p in peers) == peers[0].global_train_size == 120
    weights = peers[0].initial(0).flat
    assert np.isfinite(peers[2].gradient(weights, np.arange(4), np.empty_like(weights)))


def test_train_limit_and_evaluation_limit(images: Path) -> None:
    spec = WorkloadSpec("mnist", hidden=(), partition="writer", data_dir=images, train_limit=60)
    peer = build(spec, 0, NAMES, [1.0] * 3)
    assert peer.global_train_size == 60
    weights = peer.initial(0).flat
    assert peer.evaluate(weights, 7).samples == 7
    whole = peer.evaluate(weights)
    assert whole.samples == 40
    assert len(whole.per_class) == 10


def test_evaluation_in_pieces_equals_one_pass(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = build(WorkloadSpec("mnist", data_dir=images), 0, ["a"], [1.0])
    weights = peer.initial(0).flat
    whole = peer.evaluate(weights)
    monkeypatch.setattr("dlion.learn.workloads.classifier.EVALUATION_PIECE", 7)
    pieces = peer.evaluate(weights)
    assert (pieces.accuracy, pieces.samples) == (whole.accuracy, whole.samples)
    np.testing.assert_equal(pieces.per_class, whole.per_class)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)


def test_a_missing_file_is_named_with_its_place(images: Path) -> None:
    (images / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz not found in .*mnist"):
        build(WorkloadSpec("mnist", data_dir=images), 0, ["a"], [1.0])
    with pytest.raises(DataError, match="--data"):
        build(WorkloadSpec("mnist"), 0, ["a"], [1.0])


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b""),
        gzip.compress(b"\0\0\x08\x03" + bytes(12)),
        gzip.compress(b"\0\0\x09\x01\0\0\0\1\0"),
        gzip.compress(b"\0\0\x08\x01\0\0"),
        gzip.compress(b"\0\0\x08\x01\0\0\0\3ab"),
        gzip.compress(b"\0\0\x08\x01\0\0\0\3abcd"),
        gzip.compress(b"\0\0\x08\x01\xff\xff\xff\xffab"),
        gzip.compress(b"\0\0\x08\x01\0\0\0\3abc")[:-9],
    ],
    ids=range(9),
)
def test_damaged_idx_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.gz"):
        read_idx(path, rank=1)


def test_mnist_labels_that_do_not_fit_are_refused(images: Path) -> None:
    write_idx(images / "mnist" / "train-labels-idx1-ubyte.gz", np.zeros(119, dtype=np.uint8))
    with pytest.raises(DataError, match="120 train images"):
        build(WorkloadSpec("mnist", data_dir=images), 0, ["a"], [1.0])


def test_a_users_own_workload_by_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text("from dlion.learn.workloads.toy import build as mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build(WorkloadSpec("my_models:mine", size=3), 0, ["a"], [1.0]).layout.size == 3
    with pytest.raises(ValueError, match="has no 'yours'"):
        build(WorkloadSpec("my_models:yours"), 0, ["a"], [1.0])
    monkeypatch.delitem(sys.modules, "my_models")


@pytest.mark.parametrize("name", ["nothing", "no_such_package.module:build"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="workload"):
        build(WorkloadSpec(name), 0, ["a"], [1.0])


def test_the_table_is_lazy() -> None:
    assert set(WORKLOADS) >= {"toy", "digits", "mnist", "fashion-mnist"}
    assert all(isinstance(target, str) for target in WORKLOADS.values())


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"size": 0}, {"train_limit": 0}, {"hidden": (0,)}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="workload"):
        WorkloadSpec("toy", **settings)  # type: ignore[arg-type]


REAL = Path(__file__).parents[2] / "shared" / "data" / "training"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real image files are not at ../shared/data/training")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_files_load_with_their_canonical_statistics(name: str) -> None:
    """60,000 + 10,000 images, normalised to mean 0 and deviation 1 by the canonical figures; mnist's 539 writers."""
    data = idx.load.__wrapped__(name, REAL, name == "mnist")
    assert (data.train_images.shape, data.test_images.shape) == ((60_000, 784), (10_000, 784))
    inputs = data.normalised(data.train_images)
    assert inputs.mean(dtype=np.float64) == pytest.approx(0, abs=5e-4)
    assert inputs.std(dtype=np.float64) == pytest.approx(1, abs=5e-4)
    assert data.writers is None or len(np.unique(data.writers)) == 539
    assert np.bincount(data.test_labels[:1000]).min() > 60
