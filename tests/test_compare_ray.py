"""``compare --on ray``: the same cells on a cluster of two nodes give the same hashes, and failures are reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlion.cli import engines
from dlion.cli.build import Plan
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
