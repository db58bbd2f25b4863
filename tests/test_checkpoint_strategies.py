"""Every built-in strategy goes on from a cut in full flight: nobody hangs, and consensus is reached if promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from node_runs import net
from test_checkpoint_node import Kept, at, kept_run

from dlion.exchange import EXCHANGES, find
from dlion.tensors import disagreement

ROUNDS = ("diloco", "local-sgd", "sparseloco", "fedavg", "noloco", "streaming")
MESH = ("choco", "noloco", "hop")
"""Not made for bridges."""


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_goes_on_from_a_cut_in_full_flight(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {"local_steps": 4} if name in ROUNDS else {}
    if name == "fedavg":
        settings["deadline_s"] = 0.5 * seed
    if name == "dlion":
        settings |= {"transfer_every": 5, "residual": bool(seed)}
    talk = "bridges" if seed and name not in MESH else "mesh"
    topology = net("a1 a2 | b1 b2", talk, mbps=rng.uniform(0.1, 0.3), delay_s=rng.uniform(0.0, 0.1))  # type: ignore[arg-type]
    common: dict[str, Any] = {"topology": topology, "exchange": lambda: find(name)(**settings), "seed": seed}
    kept = Kept()
    kept_run(kept, until_s=3.0, each=at(rng.uniform(1.0, 2.0)), settings={"drain_s": 0.0}, **common)
    (number,) = kept.whole(4)
    parts = kept.cuts[number]
    after = kept_run(kept, number, until_s=4.0, start_s=parts["a1"].t, settings={"drain_s": 60.0}, **common)
    assert all(after.result.steps[peer] >= part.step + 4 for peer, part in parts.items())  # type: ignore[index]
    assert not any("cut short" in end["reason"] for peer in parts for end in after.events(peer, "end"))
    if find(name)(**settings).consensus:
        assert disagreement(after.result.views) <= 1e-5
