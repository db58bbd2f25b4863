"""A peer inside a user's aiohttp application: it trains with a neighbour while the application answers requests."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from aiohttp import web

import dlion
from dlion.learn.workload import Evaluation, Indices
from dlion.net.upgrade import serve
from dlion.observe.read import read_directory
from dlion.observe.runlog import Apply, Step
from dlion.tensors import Flat, Layout, Tensors

TOPOLOGY = """
[clouds]
x.members = ["x1"]
y.members = ["y1"]

[[wan]]
between = ["x", "y"]
"""
JOB = """
[job]
workload = "toy"
until = "1h"

[train]
batch = 4
learning_rate = 0.5

[batching]
mode = "fixed"

[exchange]
name = "full"
"""


class Line:
    """A user's own workload: fit y = 3x - 1. About thirty lines, as the README says."""

    layout = Layout(("slope", "offset"), ((1,), (1,)))
    train_size = global_train_size = 64

    def __init__(self) -> None:
        self.x = np.linspace(-1, 1, 64, dtype=np.float32)
        self.y = 3 * self.x - 1

    def initial(self, seed: int) -> Tensors:
        return Tensors(self.layout, np.zeros(2, dtype=np.float32))

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        x = self.x[batch]
        error = weights[0] * x + weights[1] - self.y[batch]
        out[0], out[1] = (error * x).mean(), error.mean()
        sum(range(20_000))  # so that a step takes about a millisecond
        return float((error**2).mean() / 2)

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        error = weights[0] * self.x + weights[1] - self.y
        return Evaluation(float((abs(error) < 0.1).mean()), float((error**2).mean()), 64)


def _files(tmp_path: Path, name: str, other: str, port: int) -> Path:
    (tmp_path / "two.toml").write_text(TOPOLOGY)
    (tmp_path / "line.toml").write_text(JOB)
    path = tmp_path / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\ntopology = "two.toml"\njob = "line.toml"\nout = "{tmp_path / "out"}"\n'
        f'[peers]\n{other} = "127.0.0.1:{port}/dlion"\n'
    )
    return path


def test_an_application_answers_while_its_node_trains_with_a_neighbour(tmp_path: Path) -> None:
    threads_before = threading.active_count()

    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def main() -> tuple[list[float], dict[str, Flat]]:
        doors: dict[str, web.Application] = {}
        sites, embedded = {}, {}
        for name in ("x1", "y1"):
            doors[name] = web.Application()
            doors[name].router.add_get("/", hello)
        # ports must be known before the files are written, the applications mounted before they are served
        probes = [await serve(web.Application(), "127.0.0.1", 0) for _ in range(2)]
        ports = dict(zip(("x1", "y1"), (p.port for p in probes), strict=True))
        for probe in probes:
            await probe.close()
        for name, other in (("x1", "y1"), ("y1", "x1")):
            made = dlion.embed(_files(tmp_path, name, other, ports[other]), workload=Line())
            doors[name].add_subapp("/dlion", made.links)
            doors[name].add_subapp("/admin", made.admin)
            sites[name], embedded[name] = await serve(doors[name], "127.0.0.1", ports[name]), made
        waits: list[float] = []
        loop = asyncio.get_running_loop()
        async with embedded["x1"] as x, embedded["y1"] as y, aiohttp.ClientSession() as client:
            while min(x.step, y.step) < 200:
                started = loop.time()
                async with client.get(f"http://127.0.0.1:{ports['x1']}/") as answer:
                    assert await answer.text() == "hello"
                waits.append(loop.time() - started)
                await asyncio.sleep(0.005)
            async with client.get(f"http://127.0.0.1:{ports['y1']}/admin/readyz") as ready:
                assert ready.status == 200
            x.stop("enough", leaving=False)
            y.stop("enough", leaving=False)
            await asyncio.gather(x.wait(), y.wait())
        weights = {"x1": x.ctx.weights.copy(), "y1": y.ctx.weights.copy()}
        for site in sites.values():
            await site.close()
        return waits, weights

    waits, weights = asyncio.run(main(), debug=False)

    assert np.array_equal(weights["x1"], weights["y1"]), "lockstep replicas differ"
    np.testing.assert_allclose(weights["x1"], [3, -1], atol=0.05)
    run = read_directory(tmp_path / "out")
    assert run.peers["x1"][Step]["n"].size >= 200 and run.peers["x1"][Apply]["origin"].size > 0
    assert float(np.median(waits)) < 0.25, "the application did not answer while its node trained"
    assert threading.active_count() == threads_before, "a thread is left"


def test_an_embedded_peer_goes_on_from_its_last_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Leaving waits until it is written; ``fresh`` starts over."""
    path = _files(tmp_path, "x1", "y1", 9)
    (tmp_path / "two.toml").write_text('[clouds]\nx.members = ["x1"]\n')
    path.write_text(path.read_text().split("[peers]")[0])

    async def run(steps: int, *, fresh: bool = False) -> tuple[int, int]:
        embedded = dlion.embed(path, workload=Line(), fresh=fresh)
        async with embedded as node:
            begun = node.step
            while node.step < begun + steps:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            node.stop("enough", leaving=False)
        return begun, node.step

    first = asyncio.run(run(20))
    again = asyncio.run(run(5))
    assert first[0] == 0 and again[0] == first[1] >= 20
    assert any(f"goes on from checkpoint 0.end, step {first[1]}" in message for message in caplog.messages)
    assert asyncio.run(run(1, fresh=True))[0] == 0
