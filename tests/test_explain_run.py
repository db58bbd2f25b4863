"""``dlion explain`` finds what really holds a run back, and says "nothing" where nothing would help."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dlion.cli import engines
from dlion.cli.build import Plan
from dlion.cli.explain import Answer, command, show_answer
from dlion.cli.simulate import run_simulation
from dlion.config import load_job, load_topology
from dlion.mesh.topology import Resource, Speed, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate
from dlion.observe.explanation import hindmost, link_uses, peer_times
from dlion.observe.read import read_directory

A, C = PeerId("a1"), PeerId("c1")


def network(link_bps: float, slow_samples_per_s: float) -> Topology:
    """Two peers in two micro-clouds, one path each way."""
    base = load_topology("hetero-system")
    speeds = {A: 640.0, C: slow_samples_per_s}
    return Topology(
        "two",
        {p: replace(base.peers[p], speed=Speed(Rate.constant(s))) for p, s in speeds.items()},
        {e: replace(base.links[e], resources=(f"path:{e[0]}",)) for e in ((A, C), (C, A))},
        {f"path:{p}": Resource(f"path:{p}", "path", Rate.constant(link_bps)) for p in speeds},
        digest=f"{link_bps} {slow_samples_per_s}",
    )


def recorded(directory: Path, one: Topology, **more: object) -> Path:
    flags = {"exchange.name": "full", "model.size": 100_000, "job.until": 8, "batching.mode": "fixed"}
    flags |= {key.replace("__", "."): value for key, value in more.items()}
    run_simulation(Plan(load_job("toy", flags, environ={}), one), directory)
    return directory


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays without a process each; that processes give the same is tested with ``compare``."""
    inline = lambda plans, workers: ((key, engines.run_bytes(plan)) for key, plan in plans.items())  # noqa: E731
    monkeypatch.setattr(engines, "on_processes", inline)


def explained(directory: Path, *args: str) -> dict[str, object]:
    result = CliRunner().invoke(command, [str(directory), "--json", *args], catch_exceptions=False)
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_shares_are_those_of_the_whole_time(tmp_path: Path) -> None:
    run = read_directory(recorded(tmp_path, network(100e6, 64)))
    times = peer_times(run)
    for t in times.values():
        assert t["compute"] + t["pace"] + t["strategy"] + t["room"] + t["between"] == pytest.approx(1.0, abs=1e-6)
    assert hindmost(times) == C and times[C]["compute"] > 0.8 > times[A]["compute"]
    assert times[C]["step_s"] == pytest.approx(1.0) and times[C]["samples_per_s"] == pytest.approx(64)


def test_a_thin_link_costs_most_where_it_is_thin(tmp_path: Path) -> None:
    directory = recorded(tmp_path, network(2e6, 640))
    uses = link_uses(read_directory(directory))
    assert next(iter(uses.values()))["full"] > 0.3
    answer = explained(directory)["what_if"]
    assert answer["costs_most"] == "link.a-c.bandwidth"  # type: ignore[index]
    link = answer["what_ifs"][0]  # type: ignore[index]
    assert link["half"] < 0.8 * answer["as_it_is"] and link["double"] > 1.2 * answer["as_it_is"]  # type: ignore[index]


def test_a_budget_costs_most_where_it_is_thinner_than_the_link(tmp_path: Path) -> None:
    answer = explained(recorded(tmp_path, network(100e6, 640), budget__wan_bytes_per_s=250_000))["what_if"]
    assert answer["costs_most"] == "budget.wan_bytes_per_s = 250000"  # type: ignore[index]


def test_a_slow_machine_costs_most_where_it_is_slow(tmp_path: Path) -> None:
    answer = explained(recorded(tmp_path, network(100e6, 64)))["what_if"]
    assert answer["costs_most"] == "peer.c.speed" and answer["measure"] == "samples"  # type: ignore[index]
    by_name = {w["what"]: w for w in answer["what_ifs"]}  # type: ignore[index]
    link = by_name.get("link.a-c.bandwidth")
    assert link is None or link["double"] == answer["as_it_is"]  # type: ignore[index]


def test_without_replays_it_only_describes_and_in_words(tmp_path: Path) -> None:
    recorded(tmp_path, network(100e6, 64))
    assert explained(tmp_path, "--no-replay")["what_if"] is None
    text = CliRunner().invoke(command, [str(tmp_path), "--no-replay"], catch_exceptions=False).stdout
    assert "a1 waits longest" in text and "c1 waits least" in text and len(text.splitlines()) < 24


def test_nothing_helps_means_no_more_than_chance(capsys: pytest.CaptureFixture[str]) -> None:
    answer: Answer = {
        "measure": "time to 0.90",
        "as_it_is": 10.0,
        "chance": 0.17,
        "what_ifs": [{"what": "peer.a.speed", "half": 14.0, "double": 9.0}],
        "costs_most": None,
    }
    show_answer(Console(), answer)
    told = capsys.readouterr().out
    assert "9.0 s (-10%, may be chance)" in told and "help by more than chance (17%)." in told
    show_answer(Console(), {**answer, "chance": 0.0})
    assert "Doubling none of these would help." in capsys.readouterr().out
