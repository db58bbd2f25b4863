"""Real processes: killed all at once they go on from their last checkpoint; a full disk does not stop training."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from live_runs import dlion, wait_for
from node_runs import Softmax, net
from safetensors.numpy import load_file
from test_checkpoint_node import PEERS, Kept, at, kept_run

from dlion import checkpoint
from dlion.cli.build import Plan, node_of, workload_of
from dlion.cli.errors import Fault
from dlion.cli.keep import (
    FOLDER,
    Keeping,
    Start,
    cuts_of,
    from_checkpoint,
    newest_common,
    parts_of,
    set_aside,
    store_of,
    to_checkpoint,
)
from dlion.cli.simulate import play
from dlion.compute import Compute
from dlion.config import load_job, load_topology
from dlion.cut import Part, name_of, number_of, pack
from dlion.messages import PeerId
from dlion.net.link import Dialer
from dlion.node import Node, Seams
from dlion.observe.read import read_directory
from dlion.observe.runlog import Memory, RunLog, Step
from dlion.simulation import simulate

TWO = '[clouds]\nx.members = ["x1"]\ny.members = ["y1"]\n[[wan]]\nbetween = ["x", "y"]\nbandwidth = "50Mbit"\n'
EVERY_S = 1.0


def common(out: Path, plan: Plan) -> int:
    return newest_common(plan, out, plan.peers).number


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sigkill_of_every_process_loses_at_most_an_interval(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(TWO)
    out = tmp_path / "run"
    steady = ("--exchange", "full", "--pace", "bounded", "--set", f"checkpoint.every={EVERY_S}")
    arguments = ("up", "--job", "toy", "--topology", str(tmp_path / "two.toml"), "--out", str(out), *steady)
    with dlion(*arguments, "--until", "1h") as process:
        job = load_job("toy", {"exchange.name": "full", "pace.name": "bounded"})
        plan = Plan(job, load_topology(tmp_path / "two.toml"), "toy@two")
        wait_for(lambda: (out / FOLDER / "y1").is_dir() and common(out, plan) >= number_of("0.3"))
        pids = [json.loads((out / f"{peer}.host.json").read_text())["pid"] for peer in plan.peers]
        os.kill(process.pid, signal.SIGKILL)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    before = read_directory(out)
    last_s = {peer: float(before.peers[peer][Step]["t"][-1]) for peer in plan.peers}
    number, steps = common(out, plan), {}
    for peer in plan.peers:
        part = from_checkpoint(checkpoint.load(cuts_of(store_of(plan, out, peer))[number]))
        steps[peer] = part.step
        assert part.t >= last_s[peer] - EVERY_S - 1.5, "more than an interval (and a second of ticks) is lost"
    with dlion(*arguments, "--until", f"{max(last_s.values()) + 4:.0f}s", "--json") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"goes on from checkpoint {name_of(number)}" in stderr
    assert json.loads(stdout)["replica_disagreement"] <= 1e-5
    for peer in plan.peers:
        lines = (json.loads(line) for line in (out / f"{peer}.2.jsonl").read_text().splitlines())
        again = [line["n"] for line in lines if line["e"] == "step"]
        assert again[0] == steps[peer] and again == list(range(again[0], again[-1] + 1))
    with dlion("checkpoint", "list", str(out), "--json") as process:
        listed = json.loads(process.communicate(timeout=30)[0])["checkpoints"]
    assert {row["name"] for row in listed if row["common"] == "yes"} >= {"1.end"}
    with dlion("checkpoint", "export", str(out), str(tmp_path / "w.safetensors"), "--peer", "y1") as process:
        process.communicate(timeout=30)
    for name, tensor in load_file(out / "y1.safetensors").items():
        assert np.array_equal(load_file(tmp_path / "w.safetensors")[name], tensor)


def cut_in_flight() -> dict[str, Part]:
    kept = Kept()
    kept_run(kept, topology=net(PEERS, mbps=0.1, delay_s=0.1), pace="free", until_s=3.0, each=at(1.57), momentum=0.9)
    return next(parts for number, parts in kept.cuts.items() if name_of(number) == "0.1")


def plan(**flags: object) -> Plan:
    return Plan(load_job("toy", flags), net(PEERS), "test")


def keeping(out: Path, peer: str, start: Start | None = None) -> Keeping:
    return Keeping(plan(), PeerId(peer), out, Softmax(peer).layout, start or Start())


def write(out: Path, parts: dict[str, Part], *numbers: int, peers: str = PEERS) -> None:
    """The cut, as if it were each of ``numbers``, into the stores of ``peers``."""
    for peer in peers.replace("|", "").split():
        keeper = keeping(out, peer)
        for number in numbers:
            keeper.store.write(to_checkpoint(replace(parts[peer], number=number), keeper._layout, keeper._meta))
        keeper.close()


def test_a_part_comes_back_from_the_disk_as_it_was(tmp_path: Path) -> None:
    parts = cut_in_flight()
    assert any(part.heard for part in parts.values()) and any(part.under_way for part in parts.values())
    write(tmp_path, parts, 1)
    for peer, part in parts.items():
        back = keeping(tmp_path, peer, Start("0.1")).part
        assert back is not None and back.heard == part.heard and np.array_equal(back.weights, part.weights)
        for name in ("number", "t", "step", "samples", "node"):
            assert getattr(back, name) == getattr(part, name)
        mine, theirs = pack(part.state), pack(back.state)
        assert mine[0] == theirs[0] and all(np.array_equal(theirs[1][name], array) for name, array in mine[1].items())
        if part.under_way is not None:
            assert back.under_way is not None and np.array_equal(back.under_way.values, part.under_way.values)
            assert back.under_way.step == part.under_way.step


def test_the_newest_cut_that_all_have_whole_is_taken(tmp_path: Path) -> None:
    parts = cut_in_flight()
    assert newest_common(plan(), tmp_path, plan().peers).number == 0, "an empty directory begins afresh"
    write(tmp_path, parts, 1, 2)
    write(tmp_path, parts, 3, peers="a1 a2 b1")
    found = newest_common(plan(), tmp_path, plan().peers)
    assert found.number == 2 and not found.passed_over
    victim = cuts_of(store_of(plan(), tmp_path, "b2"))[2] / "state.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    found = newest_common(plan(), tmp_path, plan().peers)
    assert found.number == 1 and "truncated" in found.passed_over[0] and str(victim.parent) in found.notice
    assert found.start == Start("0.1")
    write_first = cuts_of(store_of(plan(), tmp_path, "a1"))[1] / "manifest.json"
    write_first.write_text("{}")
    assert newest_common(plan(), tmp_path, plan().peers[1:]).number == 1


def test_checkpoints_of_another_job_are_refused_with_the_way_out(tmp_path: Path) -> None:
    write(tmp_path, cut_in_flight(), 1)
    other = plan(**{"train.batch": 7})
    with pytest.raises(Fault) as fault:
        newest_common(other, tmp_path, other.peers)
    assert fault.value.code == 78 and "--fresh" in fault.value.advice
    keeper = keeping(tmp_path, "a1", Start(fresh=True))
    assert keeper.part is None and store_of(plan(), tmp_path, "a1").paths(), "nothing is touched before it is replaced"
    keeper(replace(cut_in_flight()["a1"], number=1))
    keeper.close()
    assert len(store_of(plan(), tmp_path, "a1").paths()) == 1 == len(list((tmp_path / FOLDER / "a1").glob("aside-*")))


def test_what_is_newer_than_the_cut_gone_on_from_is_set_aside(tmp_path: Path) -> None:
    """Or a number could be used twice: half of a cut of the old course beside half of one of the new."""
    parts = cut_in_flight()
    write(tmp_path, parts, 1, 2, 3)
    keeper = keeping(tmp_path, "a1", Start("0.2"))
    keeper(replace(parts["a1"], number=number_of("1.1")))
    keeper.close()
    store = store_of(plan(), tmp_path, "a1")
    assert [name_of(number) for number in cuts_of(store)] == ["0.1", "0.2", "1.1"]
    set_aside(store, None)
    assert not cuts_of(store) and len(list(store.directory.glob("aside-*"))) == 3, "asides do not pile up"


def test_a_disk_that_refuses_is_told_of_and_the_next_checkpoint_is_written(tmp_path: Path) -> None:
    parts, memory = cut_in_flight(), Memory()
    keeper = keeping(tmp_path, "a1")
    keeper.log = RunLog(memory)
    tmp_path.joinpath(FOLDER).write_text("in the way")
    keeper(parts["a1"])
    wait_for(lambda: keeper.trouble)
    assert "0.1" in keeper.trouble and "earlier ones are untouched" in keeper.trouble
    tmp_path.joinpath(FOLDER).unlink()
    keeper(replace(parts["a1"], number=2))
    keeper.close()
    assert not keeper.trouble and keeper.written == "0.2"
    keeper.log.flush()
    refuse, snapshot = (json.loads(line) for line in memory.data.splitlines())
    assert "checkpoint 0.1" in refuse["reason"]
    assert (tmp_path / snapshot["path"] / "manifest.json").exists() and snapshot["step"] == parts["a1"].step


def test_simulate_goes_on_from_what_lies_on_the_disk(tmp_path: Path) -> None:
    """From plan to files and back: as many steps and the same bits as a run at a go, learning rate by schedule."""
    rates = {"train.schedule": "cosine", "train.decay_samples": 1_000_000}
    flags = {
        "exchange.name": "full",
        "batching.mode": "fixed",
        "job.until": "2s",
        "train.momentum": 0.9,
        "train.batch": 8,
        "node.drain": "600ms",
        **rates,
    }
    short = Plan(load_job("toy", flags), net(PEERS), "test")
    keepers: list[Keeping] = []

    def make(peer: PeerId, dialer: Dialer, compute: Compute) -> Node:
        workload = workload_of(short, peer)
        keepers.append(Keeping(short, peer, tmp_path, workload.layout, Start()))
        return node_of(short, peer, Seams(dialer, compute, 0, RunLog(Memory()), keep=keepers[-1]), workload=workload)

    simulate(short.topology, make)
    for keeper in keepers:
        keeper.close()
    parts = parts_of(short, tmp_path)
    assert {name_of(part.number) for part in parts.values()} == {"0.end"} and parts["a1"].t == pytest.approx(2, abs=0.6)
    whole = Plan(load_job("toy", {**flags, "job.until": "4s"}), net(PEERS), "test")
    resumed, at_a_go = play(whole, parts=parts), play(whole)
    assert resumed.run.peers["a1"][Step]["n"][0] == parts["a1"].step
    for peer, log in resumed.run.peers.items():
        steps, reference = log[Step], at_a_go.run.peers[peer][Step]
        common = min(steps["n"][-1], reference["n"][-1])
        mine, theirs = steps["n"] <= common, (reference["n"] >= steps["n"][0]) & (reference["n"] <= common)
        assert mine.sum() > 10 and np.array_equal(steps["position"][mine], reference["position"][theirs])
        np.testing.assert_allclose(steps["loss"][mine], reference["loss"][theirs], rtol=1e-5)
        np.testing.assert_allclose(steps["lr"][mine], reference["lr"][theirs], rtol=1e-3)
