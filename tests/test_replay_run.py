"""Replay: a simulated run comes back line by line; what was recorded plays within a few percent; what-ifs change it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dlion.cli.build import Plan
from dlion.cli.errors import Fault
from dlion.cli.planfile import save_plan
from dlion.cli.replay import command, load_recorded
from dlion.cli.simulate import play, run_simulation
from dlion.config import ConfigError, load_job, load_topology
from dlion.mesh.changes import ChangeError, changed
from dlion.mesh.presence import turns
from dlion.messages import PeerId
from dlion.observe.runlog import Begin, write_host
from dlion.observe.sidebyside import pair, worst
from dlion.simulation import Death


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose links between a and c are the bottleneck: 0.8 MB per update over 35 Mbit/s."""
    directory = tmp_path_factory.mktemp("run")
    flags = {"exchange.name": "full", "model.size": 200_000, "job.until": 12, "batching.mode": "fixed"}
    network = load_topology("hetero-system")
    some = [PeerId("a1"), PeerId("c1")]
    network = replace(
        network,
        peers={p: network.peers[p] for p in some},
        links={ends: k for ends, k in network.links.items() if {*ends} <= {*some}},
    )
    run_simulation(Plan(load_job("toy", flags, environ={}), network), directory)
    return directory


def replayed(run: Path, *args: str) -> dict[str, object]:
    result = CliRunner().invoke(command, [str(run), "--json", *args], catch_exceptions=False)
    found: dict[str, object] = json.loads(result.stdout)
    return found


def steps(found: dict[str, object]) -> dict[str, int]:
    counts: dict[str, int] = found["replayed"]["steps"]  # type: ignore[index]
    return counts


def test_unchanged_it_is_the_same_run(run: Path) -> None:
    found = replayed(run)
    assert found["same_log"] is True
    both = found["recorded_against_replayed"]
    assert worst(both["steps"]) == 0 and worst(both["link_bytes"]) == 0  # type: ignore[index]


def test_from_the_logs_alone_it_is_nearly_the_same_run(run: Path) -> None:
    found = replayed(run, "--recorded")
    both = found["recorded_against_replayed"]
    assert found["same_log"] is False
    for figures in ("steps", "link_bytes"):
        most = worst(both[figures])  # type: ignore[index]
        assert most is not None and most < 0.05


def test_a_slower_bottleneck_makes_it_slower_and_a_faster_machine_not_faster(run: Path) -> None:
    asked = steps(replayed(run))
    halved = steps(replayed(run, "--set", "link.a-c.bandwidth=x0.1"))
    assert halved["a1"] < 0.8 * asked["a1"]
    assert steps(replayed(run, "--set", "peer.c1.speed=x0.5"))["c1"] < asked["c1"]


def test_a_changed_replay_is_the_run_with_that_change(run: Path) -> None:
    """What ``replay --set`` foretells is, to the last line, what the changed network gives."""
    plan = load_recorded(run).plan
    slower = replace(plan, topology=changed(plan.topology, {"link.a-c.bandwidth": 0.1}))
    foretold = replayed(run, "--set", "link.a-c.bandwidth=x0.1")["replayed"]
    assert foretold["log_sha256"] == run_simulation(slower)["log_sha256"]  # type: ignore[index]


def test_nearness_is_told_of_what_was_not_changed_only(run: Path) -> None:
    def told(*args: str) -> str:
        return CliRunner().invoke(command, [str(run), *args], catch_exceptions=False).stdout

    assert "equal log sha256" in told()
    assert "steps per peer: within" in told("--recorded")
    for change in (("--set", "peer.c1.speed=x2"), ("--set", "link.a-c.bandwidth=x2"), ("--exchange", "ako")):
        assert "steps of a1" in (text := told(*change)) and "within" not in text


def test_another_strategy_and_seed(run: Path) -> None:
    found = replayed(run, "--exchange", "ako", "--seed", "3", "--until", "4s", "--set", "train.learning_rate=0.01")
    summary = found["replayed"]
    assert (summary["exchange"], summary["seed"]) == ("ako", 3)  # type: ignore[index]


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ChangeError, match="no link a-z"):
        replayed(run, "--set", "link.a-z.bandwidth=x2")
    with pytest.raises(ChangeError, match="expected a factor"):
        replayed(run, "--set", "link.a-c.bandwidth=20Mbit")
    with pytest.raises(ConfigError, match="nonsense"):
        replayed(run, "--exchange", "nonsense")
    (tmp_path / "a1.jsonl").write_bytes((run / "a1.jsonl").read_bytes())
    with pytest.raises(Fault, match="does not say what was run"):
        replayed(tmp_path)


def test_a_peer_that_was_killed_is_killed_again(tmp_path: Path) -> None:
    job = load_job("toy", {"job.until": 20}, environ={})
    run_simulation(Plan(job, load_topology("hetero-system")), tmp_path, (Death(PeerId("b1"), 6.0),))
    (gone,) = turns(load_recorded(tmp_path).plan.topology, 20)
    assert (gone.peer, gone.comes) == ("b1", False) and 4.0 < gone.at_s <= 6.0


def test_peers_of_a_live_run_begin_as_far_apart_as_they_did(run: Path, tmp_path: Path) -> None:
    """How old an update is in whole steps follows from that; a peer that came much later was not there at the start."""
    plan = load_recorded(run).plan
    save_plan(plan, tmp_path)
    for peer, late_s in (("a1", 0.0), ("c1", 0.15)):
        log = (run / f"{peer}.jsonl").read_text()
        begun = re.sub(r'"clock_s":[\d.]+', f'"clock_s":{1.8e9 + late_s}', log)
        (tmp_path / f"{peer}.jsonl").write_text(begun)
        write_host(tmp_path, peer, {"host": "elsewhere"})
    found = load_recorded(tmp_path)
    assert found.begins == {"a1": 0.0, "c1": pytest.approx(0.15, abs=1e-5)}
    assert not load_recorded(run).begins, "a simulated run is played as it was"
    again = play(plan, begins=found.begins).run.peers
    at = {peer: float(log[Begin]["clock_s"][0]) for peer, log in again.items()}
    assert at["c1"] - at["a1"] == pytest.approx(0.15, abs=1e-5)
    assert all(float(log[Begin]["t"][0]) == 0.0 for log in again.values())


def test_changes_between_nothing_and_something() -> None:
    assert pair(2.0, 3.0)["change"] == 0.5 and pair(0.0, 0.0)["change"] == 0.0
    assert pair(None, 3.0)["change"] is None and pair(None, None)["change"] == 0.0
    assert worst({"x": pair(10, 9), "y": pair(10, 10.5)}) == pytest.approx(0.1)
    assert worst({"x": pair(None, 9)}) is None
