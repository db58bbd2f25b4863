"""A peer inside a user's aiohttp application: it trains with a neighbour while the application answers requests."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from test_readme import block

import dlion
from dlion.embedded import Embedded, embed
from dlion.learn.workload import Evaluation, Indices
from dlion.net.upgrade import serve
from dlion.observe.read import read_directory
from dlion.observe.runlog import Apply, Member, Step
from dlion.porch import Alone
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


async def _ports(count: int) -> list[int]:
    """Free ones."""
    probes = [await serve(web.Application(), "127.0.0.1", 0) for _ in range(count)]
    for probe in probes:
        await probe.close()
    return [probe.port for probe in probes]


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
        ports = dict(zip(("x1", "y1"), await _ports(2), strict=True))
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
    path = _single(tmp_path)

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


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_the_application_of_the_readme_takes_leave_over_links_that_it_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just as it stands there; its neighbour dials it, and is told at its shutdown; accuracy is shown as told."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"np": np, "Layout": Layout, "Tensors": Tensors, "Evaluation": Evaluation}
    exec(block("class Line"), names)
    exec(block("import asyncio, dlion").replace("web.run_app", "# web.run_app"), names)
    made: list[Embedded] = []
    monkeypatch.setattr(names["dlion"], "embed", lambda *a, **k: made.append(embed(*a, **k)) or made[-1])

    async def main() -> float:
        here, there = await _ports(2)
        (tmp_path / "peers").mkdir()
        for name, other, port in (("x1", "y1", there), ("y1", "x1", here)):
            path = _files(tmp_path, name, other, port)
            path.write_text(path.read_text().replace(f"127.0.0.1:{there}/dlion", ""))
        for file, new in (("x1", "west"), ("two", "two"), ("line", "line")):
            (tmp_path / f"peers/{new}.toml").write_text((tmp_path / f"{file}.toml").read_text())
        neighbour = embed(tmp_path / "y1.toml", workload=names["Line"]())
        runner = web.AppRunner(await names["application"]())
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", here).start()
        async with neighbour as node, aiohttp.ClientSession() as client:
            await _until(lambda: min(node.step, made[0].node.step) > 20)
            made[0].status.accuracy = names["Line"]().evaluate(node.ctx.weights.copy()).accuracy
            async with client.get(f"http://127.0.0.1:{here}/admin/metrics") as answer:
                assert f"dlion_accuracy {made[0].status.accuracy:g}\n" in await answer.text()
            started = time.monotonic()
            await runner.cleanup()
            return time.monotonic() - started

    took_s = asyncio.run(main())

    assert made[0].node.ended == "shutdown" and took_s < 10
    run = read_directory(tmp_path / "out")
    assert "left" in {str(state) for state in run.peers["y1"][Member]["state"]}
    assert not (tmp_path / "out/snapshots").exists(), "nobody would come for them"


class Broken(Line):
    """Its store of data goes away."""

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        raise RuntimeError("my store is gone")


class Silent(Line):
    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        super().gradient(weights, batch, out)
        return None  # type: ignore[return-value]


def _single(tmp_path: Path) -> Path:
    path = _files(tmp_path, "x1", "y1", 9)
    (tmp_path / "two.toml").write_text('[clouds]\nx.members = ["x1"]\n')
    path.write_text(path.read_text().split("[peers]")[0])
    return path


@pytest.mark.parametrize(("workload", "says"), [(Broken(), "my store is gone"), (Silent(), "expected the mean loss")])
def test_what_ends_the_training_is_raised_and_told(tmp_path: Path, workload: Line, says: str) -> None:
    """By the block and by the status; nothing that stands behind ``wait`` in the block is done."""
    reached: list[str] = []

    async def main() -> list[str]:
        embedded = dlion.embed(_single(tmp_path), workload=workload)
        with pytest.raises((RuntimeError, TypeError), match=says):
            async with embedded as node:
                elsewhere = asyncio.create_task(node.wait())
                await node.wait()
                reached.append("as if all were well")
        await elsewhere
        with pytest.raises(RuntimeError, match="runs once"):
            await embedded.__aenter__()
        return embedded.status()["reasons"]

    (reason,) = asyncio.run(main())
    assert not reached and reason.startswith("state is stopped: ") and says in reason


def test_who_never_met_anybody_is_gone_at_once(tmp_path: Path) -> None:
    """Nobody is there to take leave of: stopped before it began, while it waits, or given up."""

    async def stopped(when: Callable[[], Awaitable[None]]) -> float:
        embedded = dlion.embed(_files(tmp_path, "x1", "y1", 9), workload=Line(), flags={"node.suspect_after": "15s"})
        started = time.monotonic()
        async with embedded as node:
            await when()
            node.stop("shutdown")
        assert node.ended == "shutdown"
        return time.monotonic() - started

    async def given_up() -> None:
        path = _files(tmp_path, "x1", "y1", 9)
        async with dlion.embed(path, workload=Line(), flags={"node.start_wait": "100ms"}) as node:
            await node.wait()

    assert asyncio.run(stopped(lambda: asyncio.sleep(0))) < 10
    assert asyncio.run(stopped(lambda: asyncio.sleep(0.1))) < 10
    with pytest.raises(Alone, match="tried y1"):
        asyncio.run(given_up())


def test_a_peer_that_is_made_and_never_run_holds_nothing(tmp_path: Path) -> None:
    """As when the application's port is taken."""

    async def main() -> None:
        dlion.embed(_single(tmp_path), workload=Line())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)]


@pytest.mark.parametrize("workload", [Line, "line:Line", object()])
def test_what_is_no_workload_is_refused(tmp_path: Path, workload: Any) -> None:
    async def main() -> None:
        dlion.embed(_single(tmp_path), workload=workload)

    with pytest.raises(TypeError, match="expected an object with layout, train_size"):
        asyncio.run(main())
    assert not (tmp_path / "out").exists(), "a run that lies there keeps its plan"
