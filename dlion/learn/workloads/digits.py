"""``digits``: scikit-learn's bundled 8x8 handwritten digits (1,797 images; UCI optdigits) and a 64-512-512-10 MLP.

Law: reads scikit-learn's data file and no other; 80 % train, 20 % held out, split by the seed.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlion.learn.data import DataError, Dataset
from dlion.learn.workload import Workload, WorkloadSpec
from dlion.learn.workloads.classifier import Classifier

HIDDEN = (512, 512)
HELD_OUT = 0.2


def build(spec: WorkloadSpec, peer_index: int, peer_names: Sequence[str], shares: Sequence[float]) -> Workload:
    return Classifier.of(spec, load(spec.seed, spec.train_limit), HIDDEN, (peer_index, shares))


@lru_cache(maxsize=2)
def load(seed: int, train_limit: int | None = None) -> Dataset:
    """The data split by ``seed``: a pure function, cached so that the peers of one process share the arrays."""
    table = _table()
    table = table[np.random.default_rng((seed, 1)).permutation(len(table))]
    images, labels = table[:, :-1].astype(np.uint8), table[:, -1].astype(np.int64)
    held_out = round(HELD_OUT * len(table))
    train = images[held_out:]
    data = Dataset(
        train, labels[held_out:], images[:held_out], labels[:held_out], float(train.mean()), float(train.std())
    )
    return data.limited(train_limit, seed)


def _table() -> npt.NDArray[np.float64]:
    """Rows of 64 pixels (0 to 16) and the digit. The file is read where it lies, since importing the library takes a
    second and tens of megabytes in every peer; its loader is asked only if the file has moved."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("workload 'digits' needs scikit-learn: install the extra 'data' (pip install 'dlion[data]')")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        with gzip.open(path, "rt") as lines:
            return np.loadtxt(lines, delimiter=",", dtype=np.float64)
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return np.column_stack([pixels, digits])
