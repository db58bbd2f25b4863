"""Other frameworks in the lab get what a peer gets: data, model, gradients and speed; and dlion reads their logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from dlion.cli.build import Plan, identity_of, workload_of, write_header
from dlion.cli.planfile import load_plan, save_plan
from dlion.config import load_job, load_topology
from dlion.learn.trainer import Order, peer_seed
from dlion.messages import PeerId
from dlion.observe.evaluate import evaluate_directory
from dlion.observe.read import read_directory
from dlion.observe.runlog import End, File, RunLog, Step
from tests.test_learn_workloads import write_idx

pytest.importorskip("matplotlib", reason="the page has pictures")
SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import rival_league  # noqa: E402
import rivals  # noqa: E402

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[3])
import numpy as np, torch
from kit import here

site = here()
optimizer = torch.optim.SGD(site.model.parameters(), lr=site.rate)
before = site.weights()
site.go()
site.step()
gradients = site.arrays(p.grad for p in site.model.parameters())
np.savez(site.out / f"{site.peer}.npz", *before, *gradients)
while True:
    site.step(optimizer=optimizer)
"""

PAIR = """
[clouds]
a.members = ["a1"]
b.members = ["b1"]
[compute]
a.samples_per_s = 120
b.samples_per_s = 30
[lan]
bandwidth = "1Gbit"
delay = "1ms"
[[wan]]
between = ["a", "b"]
bandwidth = "1Gbit"
delay = "1ms"
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """240 images of noise on two peers, one of them four times as fast."""
    folder = tmp_path / "data" / "fashion-mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 240), ("t10k", 40)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", rng.integers(0, 10, count, dtype=np.uint8))
    changes = {"data.dir": str(tmp_path / "data"), "model.hidden": [8, 8], "train.batch": 12, "job.until": 3.0}
    topology = tmp_path / "pair.toml"
    topology.write_text(PAIR)
    return Plan(load_job("fashion-mnist", {**changes, "evaluate.every": 1.0}), load_topology(str(topology)))


def test_every_rival_says_exactly_what_it_needs() -> None:
    for rival in rivals.RIVALS:
        assert rivals.program(rival).exists()
        needs = (rivals.HERE / f"{rival}.txt").read_text().split()
        assert needs and all("==" in need for need in needs), rival


def test_settings_reach_the_programs_and_one_without_a_value_is_refused(tmp_path: Path) -> None:
    rivals.save_settings(tmp_path, {"a1": "10.0.0.1"}, ["round_s=5"])
    assert json.loads((tmp_path / rivals.SETTINGS).read_text())["options"] == {"round_s": "5"}
    with pytest.raises(click.BadParameter, match="'round_s'"):
        rivals.save_settings(tmp_path, {}, ["round_s"])


@pytest.mark.torch
def test_a_site_trains_as_a_peer_does_and_dlion_reads_what_it_did(plan: Plan, tmp_path: Path) -> None:
    """Weights at the start, order of the data, gradients, pace and accuracies are those of a peer."""
    pytest.importorskip("torch", reason="needs the torch extra")
    out = tmp_path / "run"
    save_plan(rivals.named(plan, "rival"), out)
    rivals.save_settings(out, {"a1": "127.0.0.1", "b1": "127.0.0.1"}, [])
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, str(tmp_path / "program.py"), str(out)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    peers = [subprocess.Popen([*words, peer, str(rivals.HERE)], env=environment) for peer in ("a1", "b1")]
    assert [peer.wait(60) for peer in peers] == [0, 0]
    assert rivals.began(out, 2)

    for peer in ("a1", "b1"):
        workload = workload_of(load_plan(out), PeerId(peer))
        start = workload.initial(0)
        batch = Order(workload.train_size, peer_seed(0, peer)).take(12)
        gradient = np.empty_like(start.flat)
        workload.gradient(start.flat, batch, gradient)
        found = list(np.load(out / f"{peer}.npz").values())
        views = workload.layout.views
        for ours, theirs in zip([*start.views.values(), *views(gradient).values()], found, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-6, err_msg=peer)
    assert list(evaluate_directory(out / "snapshots", workload, out))
    run = read_directory(out)
    steps = {peer: log[Step]["t"].size for peer, log in run.peers.items()}
    assert run.header.exchange == "rival" and all(log[End]["t"].size for log in run.peers.values())
    assert steps["b1"] < steps["a1"] <= 31 and 1 < steps["b1"] <= 8  # at most 10 and 2.5 steps a second


def test_the_longest_pause_counts_for_those_who_lived(plan: Plan, tmp_path: Path) -> None:
    """A step each second, one of them 4 s late; the dead one's silence is no pause."""
    workload = workload_of(plan, PeerId("a1"))
    for peer, ends in (("a1", [1.0, 2.0, 3.0, 8.0, 9.0]), ("b1", [1.0])):
        log = RunLog(File(tmp_path / f"{peer}.jsonl"))
        write_header(plan, identity_of(plan, PeerId(peer), workload, 1), workload, log)
        for n, t in enumerate(ends):
            log.write(Step(t=t, n=n, loss=1.0, samples=12, lr=0.1, seconds=1.0))
        if peer == "a1":
            log.write(End(t=10.0, steps=5, reason="until"))
        log.close()
    run = read_directory(tmp_path)
    assert list(rival_league.dead(run)) == ["b1"]
    assert rival_league.pause_s(run, 10.0) == pytest.approx(4.0)


def test_the_page_ranks_by_time_and_says_who_never_arrives() -> None:
    """Lines to 80 % at the time given; the last one is at 50 % when the run ends."""

    def row(strategy: str, arrives_s: float) -> dict[str, object]:
        times = [5.0 * n for n in range(13)]
        spec = {"strategy": strategy, "seed": 0, "rate": 0.05, "until_s": 60.0}
        mean = [0.8 * t / arrives_s for t in times]
        return {
            **{"spec": spec, "times": times, "mean": mean, "worst": mean, "wan_bytes": 2_000_000, "pause_s": 1.5},
            **{"died_s": {"b1": 29.8}, "void": strategy == "hivemind"},
        }

    groups = {"hivemind": [row("hivemind", 40.0)], "pride": [row("pride", 20.0)], "flower": [row("flower", 96.0)]}
    lines = rival_league.table(groups)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| **pride**", "| hivemind", "| flower"]
    assert "| 0.05 | 1 (void) | 40.0 |" in lines[3] and "| – | – | – | 50.0 | 50.0 | 2 | 1.5 | 30 |" in lines[4]
    assert "flower (at least 3.00x), hivemind (2.00x)." in rival_league.verdict(groups)


def test_a_name_that_nobody_has_is_one_error(tmp_path: Path) -> None:
    said = CliRunner().invoke(rival_league.main, ["tune", "--data", str(tmp_path), "--names", "pride,foo"])
    assert said.exit_code == 2 and "found 'foo', expected some of pride" in said.output
