"""The packaged torch workloads: sizes, data, partitions, and that they learn."""

from __future__ import annotations

import builtins
import gzip
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion.config.job import load_job
from dlion.learn.data import DataError
from dlion.learn.optimizers import AdamW
from dlion.learn.schedules import Constant
from dlion.learn.trainer import Trainer
from dlion.learn.workload import Workload, WorkloadSpec
from dlion.learn.workloads import build

JOBS = ["fashion-cnn", "shakespeare-gpt"]


@pytest.fixture
def torch(one_thread: None) -> Any:
    return importlib.import_module("torch")


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images whose brightest quarter tells their class (of four), and a play in which each speaker has one line."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 40)):
        labels = rng.integers(0, 4, size=count).astype(np.uint8)
        images = rng.integers(0, 60, size=(count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 150
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    speech = "{name}:\n" + "to be or not to be, that is the question. " * 5
    names = ("ANNA", "BORIS", "CARL", "DORA")
    play = "\n\n".join(speech.format(name=names[i % 4]) for i in range(40))
    (tmp_path / "tinyshakespeare.txt").write_text(play)
    return tmp_path


def peer(name: str, folder: Path, index: int = 0, **settings: Any) -> Workload:
    return build(WorkloadSpec(name, data_dir=folder, **settings), index, ("a", "b"), (1.0, 2.0))


def train(subject: Workload, steps: int, rate: float) -> tuple[float, float]:
    """Mean loss before and after."""
    weights = subject.initial(0).flat
    trainer = Trainer(subject, AdamW(), Constant(rate), rng_seed=0)
    before = subject.evaluate(weights, 40).loss
    for _ in range(steps):
        weights += trainer.step(weights.copy(), 16, 0.0).values
    return before, subject.evaluate(weights, 40).loss


@pytest.mark.torch
def test_the_cnn_has_its_size_and_learns(torch: Any, folder: Path) -> None:
    subject = peer("fashion-cnn", folder)
    assert subject.layout.size == 1_199_882
    assert (subject.train_size, subject.global_train_size) == (40, 120)
    before, after = train(subject, 12, 1e-3)
    assert after < 0.6 * before


@pytest.mark.torch
def test_the_gpt_has_its_size_and_learns(torch: Any, folder: Path) -> None:
    from dlion.learn.workloads.shakespeare_gpt import Gpt

    assert sum(parameter.numel() for parameter in Gpt(65).parameters()) == 1_021_680
    subject = peer("shakespeare-gpt", folder)
    assert "embed.weight" in subject.layout.names and "head.weight" not in subject.layout.names
    before, after = train(subject, 15, 2e-3)
    assert after < 0.8 * before


@pytest.mark.torch
def test_the_gpt_sees_only_what_came_before(torch: Any) -> None:
    """Changing the last character changes no earlier output."""
    from dlion.learn.workloads.shakespeare_gpt import CONTEXT, Gpt

    model = Gpt(10)
    codes = torch.randint(0, 10, (2, CONTEXT))
    other = codes.clone()
    other[:, -1] = (other[:, -1] + 1) % 10
    ours, theirs = model(codes).detach(), model(other).detach()
    torch.testing.assert_close(ours[:, :, :-1], theirs[:, :, :-1])
    assert not torch.allclose(ours[:, :, -1], theirs[:, :, -1])


@pytest.mark.torch
def test_windows_foretell_the_next_character(torch: Any, folder: Path) -> None:
    from dlion.learn.workloads.shakespeare_gpt import CONTEXT, Windows, load

    text = load(folder)
    windows = Windows(text.train, np.array([0, 5]))
    inputs, targets = windows.gather(np.array([1, 0]))
    assert inputs.shape == targets.shape == (2, CONTEXT)
    read = "".join(text.alphabet[code] for code in inputs[1])
    assert read.startswith("ANNA:\nto be or not")
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(windows[1][0], inputs[0])


@pytest.mark.torch
def test_partition_by_writer_gives_each_speaker_to_one_peer(torch: Any, folder: Path) -> None:
    from dlion.learn.workloads import shakespeare_gpt as gpt

    text = gpt.load(folder)
    shards = gpt._shards(text, "writer", 0, None, (1.0, 2.0))
    speakers = [set(text.speakers[shard]) for shard in shards]
    assert speakers[0] and speakers[1] and not speakers[0] & speakers[1]
    everything = gpt._shards(text, "iid", 0, None, (1.0, 2.0))
    assert sorted(np.concatenate(everything)) == sorted(np.concatenate(shards)) == list(gpt._starts(text.train))
    assert sum(map(len, gpt._shards(text, "iid", 0, 10, (1.0, 2.0)))) == 10
    with pytest.raises(ValueError, match="expected 'iid' or 'writer'"):
        peer("shakespeare-gpt", folder, partition="dirichlet")


@pytest.mark.torch
@pytest.mark.parametrize("name", JOBS)
def test_missing_data_is_named(torch: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        peer(name, tmp_path)
    with pytest.raises(DataError, match="--data"):
        build(WorkloadSpec(name), 0, ("a",), (1.0,))


@pytest.mark.torch
@pytest.mark.parametrize("name", JOBS)
def test_peers_start_alike_and_hold_different_data(torch: Any, name: str, folder: Path) -> None:
    one, two = peer(name, folder, 0), peer(name, folder, 1)
    weights = one.initial(3).flat
    np.testing.assert_array_equal(weights, two.initial(3).flat)
    assert one.global_train_size == two.global_train_size == one.train_size + two.train_size
    assert one.layout.digest == two.layout.digest


@pytest.mark.torch
@pytest.mark.parametrize("name", JOBS)
def test_the_same_seed_gives_the_same_bits(torch: Any, name: str, folder: Path) -> None:
    def run() -> bytes:
        subject = peer(name, folder)
        trainer = Trainer(subject, AdamW(), Constant(1e-3), rng_seed=0)
        weights = subject.initial(0).flat
        for _ in range(3):
            weights += trainer.step(weights.copy(), 8, 0.0).values
        return weights.tobytes()

    first = run()
    torch.manual_seed(1)
    assert run() == first


@pytest.mark.parametrize("name", JOBS)
def test_packaged_job(name: str, tmp_path: Path) -> None:
    job = load_job(name, environ={}, directory=tmp_path)
    assert job.job.workload == job.job.name == name


@pytest.mark.parametrize("name", JOBS)
def test_without_torch_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith("dlion.learn.workloads.")]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def absent(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".", maxsplit=1)[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"dlion\[torch\]"):
        build(WorkloadSpec(name), 0, ("a",), (1.0,))
