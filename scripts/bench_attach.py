"""What ``dlion.torch.attach`` costs a training step of fashion-cnn on the CPU: alone, and with four neighbours.

    python scripts/bench_attach.py [--rounds 5] [--steps 20] [--mbit 50] [--set exchange.name=full] [--json]

Each round times the same loop three times: plain, attached to a peer that is alone, and attached beside four neighbours
over links shaped to ``--mbit``. Only the ratio to the plain loop of the same round says something on a busy machine.
The neighbours run in one other process where nobody else wants a core, have links to us alone, step as often as the
plain loop does, and are parrots: each says the first thing that it chose again and again and ignores what it hears, so
that they take little of the processor. What they take, and what our own threads take, is told per step, since wall time
alone says nothing where cores are short. The pace is free, so that nobody waits for them. Images are noise too.

All loops train one model, and memory that was freed stays with the process: else a plain step takes 2000 to 6000 page
faults (48 to 60 ms), as the allocator's thresholds and what lies where will have it, and that is all that is measured.
Where others use the cores too, a session that goes first helps: ``setsid -w sh -c 'echo -18 > /proc/self/autogroup;
exec python scripts/bench_attach.py'``.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from dlion import exchange
from dlion.blocks import Block
from dlion.cli import host
from dlion.cli.build import batcher_of, node_settings, optimizer_of, schedule_of
from dlion.cli.peer import plan_of_peer
from dlion.config import load_setup
from dlion.exchange.base import Context, LinkView
from dlion.exchange.owed import Owed
from dlion.learn.trainer import Trainer
from dlion.learn.workload import Evaluation, Indices
from dlion.messages import PeerId
from dlion.node import Learner
from dlion.tensors import Flat, Layout, Tensors

ME, NEIGHBOURS = "me", ("n1", "n2", "n3", "n4")
BATCH, RATE = 64, 0.01
WARM_STEPS, WARM_S = 3, 5.0
"""Before the clock starts: of every loop; and of one with neighbours, whose links begin slowly."""
PARROT_AFTER_S = 3.0
START_S = 60.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""


# -- the neighbours ---------------------------------------------------------------------------------------------


class Noise:
    """A ``Workload`` of the given shape that costs next to nothing."""

    train_size = global_train_size = 60_000

    def __init__(self, layout: Layout, start: Flat) -> None:
        self.layout, self._start = layout, start
        self._gradient = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32) * np.float32(1e-3)

    def initial(self, seed: int) -> Tensors:
        return Tensors(self.layout, self._start.copy())

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        np.copyto(out, self._gradient)
        return 1.0

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        return Evaluation(0.0, 1.0, 0)


def parrots(name: str) -> None:
    """In this process the strategy ``name`` does not listen, and once it knows its links it says one thing only."""
    kind: Any = exchange.find(name)
    choose, chosen = kind.say, dict[int, Block]()

    def say(self: Any, owed: Owed, link: LinkView, ctx: Context) -> Block | None:
        if not owed.unsaid:
            return None
        if (id(self) not in chosen or ctx.now < PARROT_AFTER_S) and (
            block := choose(self, owed, link, ctx)
        ) is not None:
            chosen[id(self)] = block
        return chosen.get(id(self))

    kind.say, kind.on_message = say, lambda *_: ()


async def neighbours(directory: Path) -> None:
    """All four, until the parent ends us. Says their addresses on stdout, is told the parent's on stdin."""
    shapes = json.loads((directory / "layout.json").read_text())
    noise = Noise(Layout(tuple(shapes), tuple(map(tuple, shapes.values()))), np.load(directory / "start.npy"))
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # as if elsewhere: gives way at once, as nice does not
    here: dict[str, str] = {}
    known: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()

    async def run(name: str) -> None:
        async def introduce(address: str) -> Mapping[str, str]:
            here[name] = address
            if len(here) == len(NEIGHBOURS):
                print(json.dumps(here), flush=True)
                line = await asyncio.to_thread(sys.stdin.readline)
                known.set_result({**here, ME: line.strip()})
            return {peer: where for peer, where in (await known).items() if peer != name}

        setup = load_setup(directory / f"{name}.toml", json.loads((directory / "sets.json").read_text()), {})
        plan = plan_of_peer(setup)
        if name == NEIGHBOURS[0]:
            parrots(plan.job.exchange.name)
        trainer = Trainer(noise, optimizer_of(plan.job, "delta"), schedule_of(plan.job), 0)
        learner = Learner(trainer, batcher_of(plan, PeerId(name), noise.global_train_size))
        doors = host.Doors(("127.0.0.1", 0), None, emulate=True)
        guest = host.Guest(learner, node_settings(plan.job))
        async with host.hosted(plan, PeerId(name), doors, directory / name, introduce, guest) as running:
            await running.node.wait()

    async with asyncio.TaskGroup() as group:
        for name in NEIGHBOURS:
            group.create_task(run(name))


@contextmanager
def four_neighbours(directory: Path) -> Iterator[Any]:
    """The process they run in; yields what ``Options.addresses`` wants."""
    command = [sys.executable, __file__, "--neighbours", str(directory)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def introduce(here: str) -> Mapping[str, str]:
        assert child.stdin is not None and child.stdout is not None
        found: dict[str, str] = json.loads(child.stdout.readline())
        child.stdin.write(here + "\n")
        child.stdin.flush()
        return found

    try:
        yield introduce
    finally:
        child.kill()
        child.communicate()


# -- the loop ---------------------------------------------------------------------------------------------------


def files(directory: Path, names: tuple[str, ...], mbit: float, step_s: float) -> Path:
    """Job, topology and peer files of a run; returns the path of ours."""
    directory.mkdir()
    tables: dict[str, list[str]] = {
        "job": ['workload = "noise"'],
        "train": [f"batch = {BATCH}", f"learning_rate = {RATE}"],
        "batching": ['mode = "fixed"'],
        "pace": ['name = "free"'],
        "exchange": ['name = "dlion"'],
    }
    text = "\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in tables.items())
    (directory / "job.toml").write_text(text)
    clouds = "".join(f'{name}x.members = ["{name}"]\n' for name in names)
    compute = "".join(f"{name}.samples_per_s = {BATCH / step_s:.3f}\n" for name in names if name != ME)
    wan = "".join(
        f'[[wan]]\nbetween = ["{ME}x", "{name}x"]\nbandwidth = "{mbit:g}Mbit"\ndelay = "20ms"\n'
        for name in names
        if name != ME
    )
    (directory / "net.toml").write_text(f"[clouds]\n{clouds}[compute]\n{compute}{wan}")
    for name in names:
        others = "".join(f'{other} = ""\n' for other in (names if name == ME else (ME,)) if other != name)
        (directory / f"{name}.toml").write_text(
            f'name = "{name}"\ntopology = "net.toml"\njob = "job.toml"\nout = "{directory / name}"\n'
            f"emulate = true\n[peers]\n{others}"
        )
    return directory / f"{ME}.toml"


class Cost(NamedTuple):
    """Seconds of a step: on the clock; of the processor, in the loop's thread, in our other threads, in neighbours."""

    wall: float
    loop: float
    beside: float
    neighbours: float

    @classmethod
    def now(cls) -> Cost:
        loop = time.thread_time()
        return cls(time.perf_counter(), loop, time.process_time() - loop, sum(map(_cpu_s, _children())))


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def _cpu_s(pid: str) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Bench:
    """The same model, data and optimizer settings for every loop."""

    def __init__(self, steps: int, sets: Mapping[str, str], mbit: float) -> None:
        import torch

        from dlion.learn.workloads.fashion_cnn import cnn

        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._steps, self._sets, self._mbit = steps, sets, mbit
        self._images = torch.randn(BATCH, 1, 28, 28)
        self._labels = torch.randint(0, 10, (BATCH,))
        self._model = cnn()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=RATE, momentum=0.9)

    def _loop(self, step: Any, warm_s: float = 0.0) -> Cost:
        from torch.nn.functional import cross_entropy

        def steps(count: int) -> None:
            for _ in range(count):
                self._optimizer.zero_grad()
                loss = cross_entropy(self._model(self._images), self._labels)
                loss.backward()  # type: ignore[no-untyped-call]
                step(loss)

        warm_until = time.perf_counter() + warm_s
        steps(WARM_STEPS)
        while time.perf_counter() < warm_until:
            steps(1)
        before = Cost.now()
        steps(self._steps)
        return Cost(*((after - then) / self._steps for after, then in zip(Cost.now(), before, strict=True)))

    def plain(self) -> Cost:
        return self._loop(lambda _: self._optimizer.step())

    def attached(self, directory: Path, names: tuple[str, ...], step_s: float) -> Cost:
        from dlion.torch import Options, attach

        path = files(directory, names, self._mbit, step_s)
        model, optimizer = self._model, self._optimizer
        if len(names) == 1:
            with attach(model, optimizer, path, batch_size=BATCH, options=Options(self._sets)) as pride:
                return self._loop(pride.step)
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        (directory / "layout.json").write_text(json.dumps(shapes))
        (directory / "sets.json").write_text(json.dumps(self._sets))
        np.save(directory / "start.npy", np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]))
        with four_neighbours(directory) as introduce:
            options = Options(self._sets, introduce, together=False, drain_s=1.0, start_wait_s=START_S)
            with attach(model, optimizer, path, batch_size=BATCH, options=options) as pride:
                return self._loop(pride.step, WARM_S)


def spread(found: list[float]) -> dict[str, float]:
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--steps", default=20, show_default=True, type=click.IntRange(min=1), help="Timed, per loop and round.")
@click.option("--mbit", default=50.0, show_default=True, help="Of each directed link.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the job.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
@click.option("--neighbours", "child", type=click.Path(path_type=Path), hidden=True)
def main(rounds: int, steps: int, mbit: float, sets: tuple[str, ...], as_json: bool, child: Path | None) -> None:
    """Measure the cost of attach per step."""
    if child is not None:
        asyncio.run(neighbours(child))
        return
    bench = Bench(steps, dict(text.split("=", 1) for text in sets), mbit)
    plain: list[float] = []
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ("alone", "four_neighbours")}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds):
            before = bench.plain()
            alone = bench.attached(Path(directory) / f"alone{number}", (ME,), before.wall)
            between = bench.plain()
            four = bench.attached(Path(directory) / f"four{number}", (ME, *NEIGHBOURS), between.wall)
            after = bench.plain()
            plain += [before.wall, between.wall, after.wall]
            for name, cost, around in (
                ("alone", alone, (before, between)),
                ("four_neighbours", four, (between, after)),
            ):
                step, loop = (statistics.mean(getattr(each, what) for each in around) for what in ("wall", "loop"))
                shares = {"wall": cost.wall / step, "loop": cost.loop / loop}
                shares |= {"beside": cost.beside / loop, "neighbours": cost.neighbours / loop}
                for what, share in shares.items():
                    found[name].setdefault(what, []).append(share)
    ratios = {name: {what: spread(values) for what, values in shares.items()} for name, shares in found.items()}
    if as_json:
        click.echo(json.dumps({"plain_step_s": spread(plain), "ratios": ratios, "rounds": rounds, "steps": steps}))
        return
    click.echo(f"fashion-cnn, batch {BATCH}, one thread: a plain step takes {1000 * statistics.median(plain):.1f} ms")
    for name, shares in ratios.items():
        wall, limit = shares["wall"], 1.03 if name == "alone" else 1.10
        click.echo(
            f"{name:16} x{wall['median']:.3f}  ({wall['min']:.3f} to {wall['max']:.3f})  limit x{limit:.2f}; "
            f"processor: loop x{shares['loop']['median']:.2f}, beside it {shares['beside']['median']:.2f}, "
            f"neighbours {shares['neighbours']['median']:.2f} of a plain step"
        )


if __name__ == "__main__":
    main()
