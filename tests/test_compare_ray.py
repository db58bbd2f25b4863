"""``compare --on ray``: the same cells on a cluster of two nodes give the same hashes, failures are reported, and
Ctrl-C leaves what is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlion.cli import engines
from dlion.cli.build import Plan
from dlion.cli.errors import Fault
from dlion.cli.planfile import encode_plan
from dlion.config import load_job, load_topology

ray = pytest.importorskip("ray", reason="the ray extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def test_two_nodes_give_the_hashes_of_one_process(address: str) -> None:
    network = load_topology("hetero-system")
    plans = {
        f"seed {seed}": encode_plan(Plan(load_job("toy", {"job.until": 3, "job.seed": seed}, environ={}), network))
        for seed in range(3)
    }
    results = dict(engines.on_ray({**plans, "bad": b"no plan"}, address))
    assert isinstance(results.pop("bad"), engines.Failure)
    assert results.keys() == plans.keys()
    for key, plan in plans.items():
        found = results[key]
        assert isinstance(found, bytes)
        here = json.loads(engines.run_bytes(plan))["summary"]
        assert json.loads(found)["summary"]["log_sha256"] == here["log_sha256"]


ARGS = ("--job", "toy", "--until", "600", "--exchange", "dlion,pride", "--seeds", "2", "--on", "ray")


def started(out: Path) -> subprocess.Popen[str]:
    """On a cluster of this machine."""
    command = [sys.executable, "-m", "dlion", "compare", *ARGS, "--ray-address", "local", "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.timeout(240)
def test_ctrl_c_leaves_what_is_done_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A terminal sends it to all processes of the cluster, too."""
    first = started(tmp_path)
    assert first.stderr is not None
    told = ""
    while "cells: 1/4" not in told:
        told += first.stderr.readline()
    os.killpg(first.pid, signal.SIGINT)
    told += first.communicate()[1]
    assert first.returncode == 130 and "Traceback" not in told
    assert f"stopped: the same command goes on from {tmp_path / 'results.jsonl'}" in told
    done = len((tmp_path / "results.jsonl").read_text().splitlines())
    second = started(tmp_path)
    table, told = second.communicate()
    assert second.returncode == 0 and f"cells: {done}/4 are in the results file" in told
    assert table.count("log sha256") == 4


def test_no_cluster_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: object) -> None:
        raise ConnectionError("Could not find any\nand so on")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        Fault, match=r"no Ray cluster answers; environment RAY_ADDRESS=127\.0\.0\.1:1; Connection refused"
    ):
        next(engines.on_ray({"a": b""}))
    monkeypatch.setattr(ray, "init", none)
    with pytest.raises(Fault, match="no Ray cluster could be joined; --ray-address auto; Could not find any; correct"):
        next(engines.on_ray({"a": b""}, "auto"))
