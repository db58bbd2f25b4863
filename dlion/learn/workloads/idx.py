"""``mnist`` and ``fashion-mnist``: 28x28 grey images from IDX files in a folder that the user names.

Law: reads the four files of the data set (and, to split mnist by writer, QMNIST's labels); downloads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlion.learn.data import DataError, Dataset, read_idx
from dlion.learn.workload import Workload, WorkloadSpec
from dlion.learn.workloads.classifier import Classifier

HIDDEN = (512, 256)
NORMAL: Mapping[str, tuple[float, float]] = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}
"""Canonical mean and standard deviation of the training pixels, as shares of 255."""
WRITERS = "qmnist-train-labels-idx2-int.gz"
WRITER_COLUMN = 2


def build(spec: WorkloadSpec, peer_index: int, peer_names: Sequence[str], shares: Sequence[float]) -> Workload:
    if spec.data_dir is None:
        raise DataError(f"workload {spec.name!r} needs the folder of its IDX files (--data)")
    with_writers = spec.name == "mnist" and spec.partition == "writer"
    data = load(spec.name, spec.data_dir, with_writers)
    return Classifier.of(spec, limited(data, spec.train_limit, spec.seed), HIDDEN, (peer_index, shares))


@lru_cache(maxsize=2)
def load(name: str, data_dir: Path, with_writers: bool = False) -> Dataset:
    """Data set ``name`` from ``data_dir`` or its subfolder ``name``; cached for the peers of one process.

    The held-out set is shuffled (always alike), so that its first samples stand for all: mnist's lie sorted by source.
    Mnist's training rows alternate between two sources of unlike brightness, so never take every n-th of them.
    """
    folder = data_dir / name if (data_dir / name).is_dir() else data_dir
    train_images, train_labels = _pair(folder, "train")
    test_images, test_labels = _pair(folder, "t10k")
    order = np.random.default_rng(0).permutation(len(test_labels))
    mean, std = NORMAL[name]
    return Dataset(
        train_images,
        train_labels,
        test_images[order],
        test_labels[order],
        255 * mean,
        255 * std,
        writers=_writers(folder, train_labels) if with_writers else None,
    )


@lru_cache(maxsize=2)
def limited(data: Dataset, limit: int | None, seed: int) -> Dataset:
    return data.limited(limit, seed)


def _pair(folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", rank=3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", rank=1)
    if len(images) != len(labels) or not len(labels) or int(labels.max()) > 9:
        raise DataError(f"{folder}: {len(images)} {part} images do not fit {len(labels)} labels of digits 0 to 9")
    return images.astype(np.uint8, copy=False).reshape(len(images), -1), labels.astype(np.int64)


def _writers(folder: Path, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    table = read_idx(folder / WRITERS, rank=2)
    if table.shape[1] <= WRITER_COLUMN or not np.array_equal(table[:, 0], labels):
        raise DataError(f"{folder / WRITERS}: its rows do not match the training labels")
    return table[:, WRITER_COLUMN].astype(np.int64)
