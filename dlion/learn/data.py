"""Labelled images in memory: the training set and held-out set all peers of a process share, and the cut for each.

Law: knows arrays and IDX files; knows no model. Pixels stay bytes and are normalised batch by batch: a quarter of the
memory. Nothing here is changed after loading.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlion.learn import partition
from dlion.learn.workload import Indices
from dlion.tensors import Flat

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

IDX_TYPES: Mapping[int, np.dtype[np.integer]] = {0x08: np.dtype(np.uint8), 0x0C: np.dtype(">i4")}
IDX_BYTES_MAX = 1 << 30


class DataError(Exception):
    """Training data is missing or damaged; the message names the place and the remedy."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as rows of bytes, labels from 0, and how to normalise: (byte - mean) / std."""

    train_images: Bytes = field(repr=False)
    train_labels: Labels = field(repr=False)
    test_images: Bytes = field(repr=False)
    test_labels: Labels = field(repr=False)
    mean: float
    std: float
    classes: int = 10
    writers: npt.NDArray[np.integer] | None = field(default=None, repr=False)
    """Who wrote each training image, where that is known."""

    def normalised(self, images: Bytes) -> Flat:
        """float32 inputs for ``images`` (samples, pixels)."""
        inputs: Flat = images.astype(np.float32)
        inputs -= np.float32(self.mean)
        inputs *= np.float32(1.0 / self.std)
        return inputs

    def limited(self, limit: int | None, seed: int) -> Dataset:
        """The same with only ``limit`` training samples, drawn by ``seed``."""
        if limit is None or limit >= len(self.train_labels):
            return self
        kept = np.sort(np.random.default_rng((seed, 2)).permutation(len(self.train_labels))[:limit])
        return Dataset(
            self.train_images[kept],
            self.train_labels[kept],
            self.test_images,
            self.test_labels,
            self.mean,
            self.std,
            self.classes,
            None if self.writers is None else self.writers[kept],
        )


@lru_cache(maxsize=4)
def shards(data: Dataset, scheme: str, alpha: float, seed: int, shares: tuple[float, ...]) -> tuple[Indices, ...]:
    """Each peer's training samples; the peers of one process share one computation (a pure function, so cached)."""
    rng = np.random.default_rng((seed, 3))
    count = len(data.train_labels)
    if count < len(shares):
        raise ValueError(f"{count} training samples cannot serve {len(shares)} peers")
    if scheme == "iid":
        return tuple(partition.iid(count, shares, rng))
    if scheme == "dirichlet":
        return tuple(partition.dirichlet(data.train_labels, shares, alpha, rng))
    if scheme == "writer":
        if data.writers is None:
            raise ValueError("partition 'writer': this data does not say who wrote what (only mnist does)")
        return tuple(partition.by_writer(data.writers, shares, rng))
    raise ValueError(f"unknown partition {scheme!r}: expected 'iid', 'dirichlet' or 'writer'")


def read_idx(path: Path, rank: int) -> npt.NDArray[np.integer]:
    """A gzipped IDX file as an array of ``rank`` dimensions; DataError when it is missing or not what it should be."""
    try:
        with gzip.open(path) as stream:
            header = stream.read(4)
            if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in IDX_TYPES or header[3] != rank:
                raise DataError(f"{path}: not an IDX file of {rank} dimensions (it starts with {header.hex()})")
            lengths = stream.read(4 * rank)
            shape = tuple(int.from_bytes(lengths[at : at + 4]) for at in range(0, len(lengths), 4))
            dtype = IDX_TYPES[header[2]]
            expected = prod(shape) * dtype.itemsize
            if len(lengths) != 4 * rank or expected > IDX_BYTES_MAX:
                raise DataError(f"{path}: its header declares shape {shape}, which cannot be right")
            content = stream.read(expected + 1)
    except FileNotFoundError:
        raise DataError(f"{path.name} not found in {path.parent}: give the folder that holds it (--data)") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(content) != expected:
        raise DataError(f"{path}: shape {shape} needs {expected} bytes, found {min(len(content), expected + 1)}")
    return np.frombuffer(content, dtype=dtype).reshape(shape)
