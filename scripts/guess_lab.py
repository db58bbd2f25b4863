"""What should a peer assume of the others until it hears them? A laboratory for the guess in ``pride``.

    python scripts/guess_lab.py --data ../shared/data/training [--scenario hetero-system] [--partition dirichlet]
        [--seed 1] [--until 40] [--phase 0.5] GUESS...

A GUESS is ``lockstep`` (of all, without delay) or settings of ``Guess``, as in ``own=1,foresight=0.25,slices=4``.
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

RATE, MOMENTUM, EVERY_S, TRUST_STEPS = 0.05, 0.9, 2.5, 8
GOALS = (0.80, 0.82, 0.83, 0.84)


@dataclass(frozen=True)
class Guess:
    """What a peer does about the others' steps that it has not heard of."""

    own: float = 0.0
    """Of each that is not heard: so much of our step of that time, in proportion to its weight."""
    foresight: float = 0.0
    """A whole step like our own last, once more."""
    slices: int = 1
    """A step's gradient in so many, each where we are by then, and"""
    reach: float = 1.0
    """so much of what the slices before it make of the step."""
    micro: int = 1
    """In place of each step so many, with that part of its samples; rate and momentum to match."""
    delay_s: float = 0.12


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

    def gradient(self, peer: PeerId, weights: Flat, samples: int) -> Flat:
        found = np.empty_like(weights)
        self.work[peer].gradient(weights, self.order[peer].take(samples), found)
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
            velocity += np.float32(peers.weight[p]) * peers.gradient(p, at, peers.batch[p])
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
        self.momentum = MOMENTUM ** (1 / guess.micro)
        self.rate = RATE / guess.micro * (1 - self.momentum) / (1 - MOMENTUM)
        self.batch = {p: max(1, round(b / guess.micro)) for p, b in peers.batch.items()}
        self.landed, self.far = peers.start.copy(), peers.start.copy()
        self.velocity = {p: zero.copy() for p in peers.names}
        self.found = {p: zero.copy() for p in peers.names}
        """The gradient of the slices so far, each sample counting 1 / batch."""
        self.near = {cloud: deque[tuple[PeerId, float, Flat]]() for cloud in peers.cloud.values()}
        """Each micro-cloud's steps that are on their way to the others, oldest first: whose, when, what."""
        self.assumed = {p: deque[tuple[float, Flat, set[PeerId]]]() for p in peers.names}
        """Own steps, and who was not yet heard of its step of that time."""

    def slice(self, p: PeerId, number: int) -> None:
        guess, batch = self.guess, self.batch[p]
        first, end = (batch * k // guess.slices for k in (number, number + 1))
        if not number:
            self.found[p] = np.zeros_like(self.peers.start)
        if end > first:
            at = self.where(p)
            at -= np.float32(self.rate * guess.reach) * self.direction(p, first / batch) * np.float32(first > 0)
            self.found[p] += np.float32((end - first) / batch) * self.peers.gradient(p, at, end - first)

    def direction(self, p: PeerId, part: float) -> Flat:
        """Velocity by which so much of the step goes, its gradient being that of the slices so far."""
        return np.float32(self.momentum * part) * self.velocity[p] + self.found[p]

    def where(self, p: PeerId) -> Flat:
        guess, weight = self.guess, self.peers.weight
        at = sum((values for _, _, values in self.near[self.peers.cloud[p]]), self.far.copy())
        for _, values, unheard in self.assumed[p]:
            at += np.float32(guess.own * sum(weight[q] for q in unheard) / weight[p]) * values
        if guess.foresight and self.assumed[p]:
            at += np.float32(guess.foresight / weight[p]) * self.assumed[p][-1][1]
        return at

    def land(self, p: PeerId, now: float) -> None:
        peers = self.peers
        self.velocity[p] = self.direction(p, 1.0)
        values = np.float32(-self.rate * peers.weight[p]) * self.velocity[p]
        self.landed += values
        self.near[peers.cloud[p]].append((p, now, values))
        self.assumed[p].append((now, values, set(peers.names) - {p}))
        if len(self.assumed[p]) > TRUST_STEPS * self.guess.micro:
            self.assumed[p].popleft()
        self.heard(p, now, [q for q in peers.names if peers.cloud[q] == peers.cloud[p]])

    def hear(self, cloud: str) -> None:
        """All others hear the oldest step of ``cloud`` that is on its way."""
        p, at, values = self.near[cloud].popleft()
        self.far += values
        self.heard(p, at, [q for q in self.peers.names if self.peers.cloud[q] != cloud])

    def heard(self, p: PeerId, at: float, by: list[PeerId]) -> None:
        for q in by:
            for time, _, unheard in self.assumed[q]:
                if time <= at:
                    unheard.discard(p)


def free(peers: Peers, until_s: float, guess: Guess, phase: float) -> list[float]:
    """Accuracies of what has landed. Peers begin within ``phase`` of a step of each other."""
    state, found, number, rng = Free(peers, guess), list[float](), count(), np.random.default_rng(5)
    due = [(s * phase * rng.random(), next(number), "slice", p, 0) for p, s in peers.step_s.items()]
    heapq.heapify(due)
    while due[0][0] < until_s:
        now, _, what, p, slice_ = heapq.heappop(due)
        while len(found) < now // EVERY_S:
            found.append(peers.accuracy(state.landed))
        if what == "hear":
            state.hear(peers.cloud[p])
            continue
        if what == "land":
            state.land(p, now)
            heapq.heappush(due, (now + guess.delay_s, next(number), "hear", p, 0))
        state.slice(p, slice_)
        slice_, lasts_s = slice_ + 1, peers.step_s[p] / guess.micro / guess.slices
        after = ("slice", p, slice_) if slice_ < guess.slices else ("land", p, 0)
        heapq.heappush(due, (now + lasts_s, next(number), *after))
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
            numbers = {name: int(v) if name in ("slices", "micro") else float(v) for name, v in settings.items()}
            found = free(peers, until_s, Guess(**numbers), phase)  # type: ignore[arg-type]
        click.echo(f"{text:<44} {line(found)}")


if __name__ == "__main__":
    main()
