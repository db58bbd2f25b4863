"""When the peer that carries a bridge dies, another one carries it on, though the two never spoke before."""

from __future__ import annotations

from dlion.cli.build import Plan
from dlion.cli.simulate import play
from dlion.config import load_job, load_topology
from dlion.messages import PeerId
from dlion.observe.runlog import Apply, Step
from dlion.simulation import Death


def test_a_dead_bridge_is_replaced_and_the_survivors_step_on() -> None:
    """b1 bridges a and b in ``demo``. After it dies, updates of b2 still reach a1, and nobody stops stepping."""
    job = load_job("toy", {"job.until": 40, "exchange.name": "dlion", "exchange.settings.transfer": "off"}, environ={})
    topology = load_topology("demo")
    played = play(Plan(job, topology), (Death(PeerId("b1"), 12.0),))

    for peer in ("a1", "a2", "b2", "c1", "c2"):
        steps = played.run.peers[peer][Step]
        late = steps["t"] > 25.0
        assert late.sum() >= 5, f"{peer} made {late.sum()} steps after 25 s"
    accuracy = played.summary["accuracy"]
    survivors = [value for peer, value in accuracy["per_peer"].items() if peer != "b1"]
    assert accuracy["worst"] == min(survivors) and accuracy["per_peer"]["b1"] < min(survivors), "the dead count"
    heard = played.run.peers["a1"][Apply]
    from_b = [hop for hop, t in zip(heard["hop"], heard["t"], strict=True) if t > 20.0 and hop == "b2"]
    assert from_b, "nothing of b2 reached a1 after b1 died"
