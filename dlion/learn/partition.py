"""Who gets which training samples.

Law: pure functions of labels, shares and a generator; every sample goes to exactly one peer, and every peer gets some.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dlion.learn.workload import Indices

SHARD_SAMPLES_MIN = 8
"""What every peer gets of a skewed partition, where there are that many samples for all."""


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` in whole parts proportional to ``weights`` (finite, above 0), at least 1 each, by largest remainder.

    Those whose proportional part is below 1 get 1, and the others share the rest. Ties go to the earlier entry.
    """
    if total < len(weights):
        raise ValueError(f"cannot give {len(weights)} peers at least 1 each of {total}")
    if not all(0 < w < np.inf for w in weights):
        raise ValueError(f"weights must be finite and above 0, not {list(weights)}")
    largest = max(weights, default=1.0)
    scaled = [w / largest for w in weights]
    open_to, parts, rest = list(range(len(weights))), [1] * len(weights), total
    while True:
        mass = sum(scaled[k] for k in open_to)
        small = [k for k in open_to if rest * scaled[k] < mass]
        if not small:
            break
        rest -= len(small)
        open_to = [k for k in open_to if k not in small]
    quotas = {k: rest * scaled[k] / mass for k in open_to}
    for k, quota in quotas.items():
        parts[k] = int(quota)
    left = rest - sum(parts[k] for k in open_to)
    for k in sorted(open_to, key=lambda k: parts[k] - quotas[k])[:left]:
        parts[k] += 1
    return parts


def iid(count: int, shares: Sequence[float], rng: np.random.Generator) -> list[Indices]:
    """A shuffled deck of ``count`` samples cut in proportion to ``shares``."""
    ends = np.cumsum(apportion(count, shares))[:-1]
    return [np.sort(part) for part in np.split(rng.permutation(count), ends)]


def dirichlet(
    labels: npt.NDArray[np.integer], shares: Sequence[float], alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Skewed labels: each peer's mix of labels is drawn from Dirichlet(alpha) (Hsu et al., 2019), sizes by ``shares``.

    The drawn mixes are scaled (iterative proportional fitting) until each label is dealt out once and sizes come near
    their shares; a peer below the minimum is filled up from the largest shard.
    """
    sizes = np.array(apportion(len(labels), shares), dtype=np.float64)
    classes, counts = np.unique(labels, return_counts=True)
    mix = rng.dirichlet(np.full(len(classes), alpha), size=len(sizes)) + 1e-9
    for _ in range(100):
        mix *= (sizes / mix.sum(axis=1))[:, None]
        mix *= counts / mix.sum(axis=0)
    shards: list[list[Indices]] = [[] for _ in sizes]
    for column, label in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.rint(np.cumsum(mix[:, column])).astype(np.int64)[:-1]
        for shard, part in zip(shards, np.split(members, ends), strict=True):
            shard.append(part)
    return [np.sort(shard) for shard in _fill([np.concatenate(parts) for parts in shards])]


def by_writer(writers: npt.NDArray[np.integer], shares: Sequence[float], rng: np.random.Generator) -> list[Indices]:
    """Whole writers dealt to peers: one each, then each writer to the peer that is furthest below its share."""
    names, counts = np.unique(writers, return_counts=True)
    if len(names) < len(shares):
        raise ValueError(f"partition by writer: {len(names)} writers cannot serve {len(shares)} peers")
    wanted = np.array(apportion(len(writers), shares), dtype=np.float64)
    owner = np.empty(len(names), dtype=np.int64)
    for turn, writer in enumerate(rng.permutation(len(names))):
        owner[writer] = turn if turn < len(shares) else int(np.argmax(wanted))
        wanted[owner[writer]] -= counts[writer]
    owner_of_sample = owner[np.searchsorted(names, writers)]
    return [np.flatnonzero(owner_of_sample == peer) for peer in range(len(shares))]


def _fill(shards: list[Indices]) -> list[Indices]:
    """Bring every shard up to the minimum, taking from the largest."""
    minimum = min(SHARD_SAMPLES_MIN, sum(map(len, shards)) // len(shards))
    for poor, shard in enumerate(shards):
        lacking = minimum - len(shard)
        while lacking > 0:
            rich = max(range(len(shards)), key=lambda k: len(shards[k]))
            taken = min(lacking, len(shards[rich]) - minimum)
            shards[poor] = np.concatenate([shards[poor], shards[rich][:taken]])
            shards[rich] = shards[rich][taken:]
            lacking -= taken
    return shards
