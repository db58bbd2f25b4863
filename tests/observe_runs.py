"""Synthetic run logs for the tests of observe: six peers in three micro-clouds, drawn from a seed, no training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlion.observe import runlog

CLOUDS = {"a": 50e6, "b": 35e6, "c": 20e6}


def dip(source: str, target: str, share: float) -> float:
    """Links out of micro-cloud a are slow for a quarter of the run."""
    return 0.4 if source[0] == "a" != target[0] and 0.5 < share < 0.75 else 1.0


def peer_events(
    peer: str, peers: list[str], seconds: float, seed: int = 0, exchange: str = "dlion"
) -> Iterator[runlog.Event]:
    rng = np.random.default_rng([seed, peers.index(peer)])
    cloud = peer[0]
    slow = {"a": 1.0, "b": 2.0, "c": 6.0}.get(cloud, 1.0)
    hurry = 1.0 if exchange == "dlion" else 0.55
    yield runlog.Header(
        t=0.0, version="0.1.0", run=f"r{seed}", peer=peer, cloud=cloud, incarnation=1, seed=seed, config="0a1b2c3d4e5f",
        exchange=exchange, job="digits", topology="hetero-system", model="feedface", model_bytes=1_300_000,
    )  # fmt: skip
    t, n, sent, next_second = 0.0, 0, dict.fromkeys(peers, 0), 1.0
    batch = round(64 / slow)
    yield runlog.Batch(t=t, size=batch, global_size=192)
    while t < seconds:
        if n and n % 40 == 0 and batch < 200:
            batch = round(batch * 1.5)
            yield runlog.Batch(t=t, size=batch, global_size=batch * 4)
        wait = float(rng.exponential(0.002 if exchange == "dlion" else 0.08))
        lasted = 0.2 * float(rng.uniform(0.95, 1.05))
        t += lasted + wait
        loss = 2.3 * np.exp(-t * hurry / 12) + 0.15 + float(rng.normal(0, 0.05))
        yield runlog.Step(
            t=t,
            n=n,
            loss=loss,
            samples=batch,
            lr=0.1,
            seconds=lasted,
            waited=runlog.Waited(wait * 0.7, 0.0, wait * 0.3),
        )
        n += 1
        for seq, to in enumerate(p for p in peers if p != peer):
            wan = to[0] != cloud
            share = float(np.clip(rng.normal(0.9, 0.05), 0, 1)) if exchange == "dlion" else 0.45
            nbytes = (
                int(dip(peer, to, t / seconds) * min(CLOUDS[max(cloud, to[0])] * lasted / 8 * share, 1_300_000))
                if wan
                else 1_300_000
            )
            sent[to] += nbytes
            yield runlog.Send(
                t=t, to=to, seq=n * 8 + seq, kind="gradient", budget=nbytes, entries=nbytes // 2, bytes=nbytes, wan=wan
            )
            gap = int(rng.poisson(1 + 2 * wan))
            yield runlog.Apply(t=t, origin=to, hop=to, seq=n, step=max(n - 1 - gap, 0), mine=n, entries=900)
        if t >= next_second:
            for to in (p for p in peers if p != peer):
                wan = to[0] != cloud
                limit = (CLOUDS[max(cloud, to[0])] if wan else 1e9) * dip(peer, to, t / seconds)
                yield runlog.Link(
                    t=t, peer=to, up=True, rate_bps=limit * 0.97, available_bps=limit, rtt_s=0.06, unacked=10, queued=0,
                    sent_bytes=int(sent[to] * 0.95), acked_bytes=int(sent[to] * 0.9), saturated=0.9,
                )  # fmt: skip
            if round(next_second) % 2 == 0:
                accuracy = 0.97 * (1 - np.exp(-t * hurry / 8)) - 0.01 * slow + float(rng.normal(0, 0.004))
                yield runlog.Eval(t=t, step=n, accuracy=accuracy, loss=loss, samples=360)
            next_second += 1.0
    yield runlog.End(t=t, steps=n, reason="until")


def write_run(directory: Path, peers: list[str], seconds: float = 20.0, seed: int = 0, exchange: str = "dlion") -> Path:
    for peer in peers:
        log = runlog.RunLog(runlog.File(runlog.next_log_path(directory, peer)))
        for event in peer_events(peer, peers, seconds, seed, exchange):
            log.write(event)
        log.close()
    return directory


SIX = ["a1", "a2", "b1", "b2", "c1", "c2"]
