"""What should a peer assume of the others until it hears them? A laboratory for the guess in ``pride``.

    python scripts/guess_lab.py --data ../shared/data/training [--scenario hetero-system] [--partition dirichlet]
        [--seed 1] [--until 40] [--phase 0.5] GUESS...

A GUESS is ``lockstep`` (of all, without delay) or settings of ``Guess``, as in ``own=1,foresight=0.25,delay_s=0.12``.
Prints, for each, seconds to 80, 82, 83 and 84 % and the mean accuracy of the second half of the time, on the whole test
set, smoothed over three points 2.5 s apart.

Law: the league's model, data, batches and speeds, one loop, plain arithmetic; no message, no link, no rounding. Peers
of one micro-cloud hear each other at once, the others after a delay. It tells what a guess is worth, not what it costs.
"""

from __future__ import annotations

import heapq
import os
import sys
from collections import deque
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np
from league import Spec, plan_of

from dlion.cli.build import workload_of
from dlion.learn.trainer import Order, peer_seed
from dlion.messages import PeerId
from dlion.tensors import Flat

RATE, MOMENTUM, EVERY_S = 0.05, 0.9, 2.5
GOALS = (0.80, 0.82, 0.83, 0.84)


@dataclass(frozen=True)
class Guess:
    """How much of what is assumed of others, in the steps that they do during one of ours."""

    own: float = 0.0
    """As we do, in proportion to their weight."""
    foresight: float = 0.0
    """A whole step like our own last, once more."""
    heard: float = 0.0
    """As we last heard of each."""
    mates: float = 0.0
    """Those beyond our micro-cloud: as its peers together did last."""
    drift: float = 0.0
    """Beside ``own``: the mean difference between what was heard and that, over so many steps."""
    delay_s: float = 0.12
    wait_s: float = 0.0
    """How long a peer waits between two steps, for what others did at the same time."""


class Peers:
    """Everybody's data, batch, weight and time for a step."""

    def __init__(self, spec: Spec, data: Path) -> None:
        plan = plan_of(spec, data)
        self.names = plan.peers
        self.cloud = {p: plan.topology.peers[p].cloud for p in self.names}
        self.work = {p: workload_of(plan, p) for p in self.names}
        self.order = {p: Order(self.work[p].train_size, peer_seed(spec.seed, p)) for p in self.names}
        speeds = {p: speed.samples_per_s.mean for p in self.names if (speed := plan.topology.peers[p].speed)}
        samples = plan.job.batching.global_start or plan.job.train.batch * len(self.names)
        self.batch = {p: max(1, round(samples * s / sum(speeds.values()))) for p, s in speeds.items()}
        self.step_s = {p: self.batch[p] / s for p, s in speeds.items()}
        self.weight = {p: b / sum(self.batch.values()) for p, b in self.batch.items()}
        self.start: Flat = self.work[self.names[0]].initial(spec.seed).flat.copy()

    def gradient(self, peer: PeerId, weights: Flat) -> Flat:
        found = np.empty_like(weights)
        self.work[peer].gradient(weights, self.order[peer].take(self.batch[peer]), found)
        return found

    def accuracy(self, weights: Flat) -> float:
        return self.work[self.names[0]].evaluate(weights).accuracy


def lockstep(peers: Peers, until_s: float, nesterov: bool) -> list[float]:
    """Accuracies of all in step, with nothing between them; with Nesterov's look-ahead or without."""
    weights, velocity, found, now = peers.start.copy(), np.zeros_like(peers.start), list[float](), 0.0
    while now < until_s:
        at = weights - np.float32(RATE * MOMENTUM) * velocity if nesterov else weights
        velocity *= np.float32(MOMENTUM)
        for p in peers.names:
            velocity += np.float32(peers.weight[p]) * peers.gradient(p, at)
        weights = weights - np.float32(RATE) * velocity
        now += max(peers.step_s.values())
        while len(found) < now // EVERY_S:
            found.append(peers.accuracy(weights))
    return found


class Free:
    """All at their own times. What lands is in ``landed``; what everybody has heard, in ``far``."""

    def __init__(self, peers: Peers, guess: Guess) -> None:
        zero = np.zeros_like(peers.start)
        self.peers, self.guess = peers, guess
        self.landed, self.far = peers.start.copy(), peers.start.copy()
        self.velocity = {p: zero.copy() for p in peers.names}
        self.last, self.last_far, self.sum_far = (
            dict.fromkeys(peers.names, zero),
            dict.fromkeys(peers.names, zero),
            zero.copy(),
        )
        self.near = {cloud: deque[Flat]() for cloud in peers.cloud.values()}
        """Each micro-cloud's steps that are on their way to the others, oldest first."""
        self.drift = {p: zero.copy() for p in peers.names} if guess.drift else {}
        self.at = dict.fromkeys(peers.names, peers.start)

    def step(self, p: PeerId) -> Flat:
        self.velocity[p] *= np.float32(MOMENTUM)
        self.velocity[p] += self.peers.gradient(p, self.at[p])
        values = np.float32(-RATE * self.peers.weight[p]) * self.velocity[p]
        self.landed += values
        self.last[p] = values
        self.near[self.peers.cloud[p]].append(values)
        return values

    def hear(self, p: PeerId) -> None:
        """All others hear the oldest step of ``p`` that is on its way."""
        values = self.near[self.peers.cloud[p]].popleft()
        self.far += values
        self.sum_far += values - self.last_far[p]
        self.last_far[p] = values

    def begin(self, p: PeerId) -> None:
        """Where the next gradient is taken."""
        guess, weight, own = self.guess, self.peers.weight, self.last[p]
        mates = [q for q in self.peers.names if self.peers.cloud[q] == self.peers.cloud[p]]
        others = float(1 / weight[p] - 1)
        at = sum(self.near[self.peers.cloud[p]], self.far.copy())
        at += np.float32(guess.own * others + guess.foresight / weight[p]) * own
        if guess.mates:
            together = sum(weight[q] for q in mates)
            at += np.float32(guess.mates * (1 / together - 1)) * sum(self.last[q] for q in mates)
        if guess.heard or guess.drift:
            heard = self.sum_far + sum(self.last[q] * np.float32(q != p) - self.last_far[q] for q in mates)
            at += np.float32(guess.heard) * heard
            if guess.drift:
                self.drift[p] += np.float32(1 / guess.drift) * (heard - np.float32(others) * own - self.drift[p])
                at += np.float32(1 + guess.foresight) * self.drift[p]
        self.at[p] = at


def free(peers: Peers, until_s: float, guess: Guess, phase: float) -> list[float]:
    """Accuracies of what has landed. Peers begin within ``phase`` of a step of each other."""
    state, found, number, rng = Free(peers, guess), list[float](), count(), np.random.default_rng(5)
    due = [(s * (1 + phase * rng.random()), next(number), "step", p) for p, s in peers.step_s.items()]
    heapq.heapify(due)
    while due[0][0] < until_s:
        now, _, what, p = heapq.heappop(due)
        while len(found) < now // EVERY_S:
            found.append(peers.accuracy(state.landed))
        if what == "hear":
            state.hear(p)
        elif what == "begin":
            state.begin(p)
            heapq.heappush(due, (now + peers.step_s[p], next(number), "step", p))
        else:
            state.step(p)
            heapq.heappush(due, (now + guess.delay_s, next(number), "hear", p))
            heapq.heappush(due, (now + guess.wait_s, next(number), "begin", p))
    return found


def line(found: list[float]) -> str:
    values = np.convolve(np.pad(found, 1, mode="edge"), np.ones(3) / 3, "valid")
    times = EVERY_S * np.arange(1, len(values) + 1)
    reached = [
        np.interp(goal, np.maximum.accumulate(values), times) if values.max() >= goal else np.nan for goal in GOALS
    ]
    shown = "  ".join(f"{goal:.0%} {at:5.1f} s" for goal, at in zip(GOALS, reached, strict=True))
    return f"{shown}  second half {values[len(values) // 2 :].mean():.2%}"


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--scenario", default="hetero-system", show_default=True)
@click.option("--partition", default="iid", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--until", "until_s", default=40.0, show_default=True)
@click.option("--phase", default=0.5, show_default=True, help="Of a step, between those who begin first and last.")
@click.argument("guesses", nargs=-1, required=True)
def main(
    data: Path, scenario: str, partition: str, seed: int, until_s: float, phase: float, guesses: tuple[str, ...]
) -> None:
    known = [f.name for f in fields(Guess)]
    for text in guesses:
        settings = dict(part.partition("=")[::2] for part in text.split(","))
        if wrong := settings.keys() - {"lockstep", "nesterov", *known}:
            sys.exit(f"{text}: unknown {', '.join(wrong)}; expected lockstep[,nesterov] or some of {', '.join(known)}")
        peers = Peers(Spec("pride", scenario, seed, RATE, until_s, partition), data)
        if "lockstep" in settings:
            found = lockstep(peers, until_s, "nesterov" in settings)
        else:
            found = free(peers, until_s, Guess(**{name: float(value) for name, value in settings.items()}), phase)
        click.echo(f"{text:<44} {line(found)}")


if __name__ == "__main__":
    main()
