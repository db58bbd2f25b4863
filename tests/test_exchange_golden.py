"""What each strategy says in a tiny case, word for word: tests/golden/NAME.txt, a transcript to read.

Four weights, whole numbers, shares of a quarter and a half, three significant digits: no sum depends on the machine.
After a wanted change look at the difference of ``python tests/test_exchange_golden.py``, which writes the files anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion.exchange import EXCHANGES, find
from dlion.tensors import Flat, Layout
from dlion.testing import Bench

GOLDEN = Path(__file__).parent / "golden"
BATCHES = {"a0": 32, "a1": 32, "b0": 64}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "ako": {"partitions": 2},
    "choco": {"density": 0.25},
    "diloco": {"local_steps": 2},
    "dlion": {"transfer_every": 2},
    "fedavg": {"local_steps": 1, "share": 0.5},
    "gaia": {"threshold": 1.5},
    "hop": {"backup": 0, "staleness": 1},
    "noloco": {"local_steps": 1},
    "sparseloco": {"local_steps": 1, "chunk": 4, "keep": 1},
    "streaming": {"local_steps": 2, "fragments": 2},
}
"""So that two steps show what is the strategy's own."""


def push(peer: str, step: int, weights: Flat) -> Flat:
    """Whole numbers that tell the peers, the steps and the entries apart."""
    factor = {"a0": 1, "a1": -1, "b0": 2}[peer] * (step + 1)
    return np.array([1, 2, -4, 8], dtype=np.float32) * np.float32(factor)


def converse(name: str) -> list[str]:
    """Two rounds of steps; one with the bridge full; a death; the drain."""
    make = partial(find(name), **SETTINGS.get(name, {}))
    clouds = {peer: peer[0].upper() for peer in BATCHES}
    bench = Bench(make, clouds, layout=Layout(("w",), ((4,),)), talk="bridges", batches=BATCHES)

    def each_steps_and_hears_one_message() -> None:
        for peer in bench.live:
            if bench.may_step(peer):
                bench.step(peer, push, loss=float(ord(peer[-2])))
                while bench.fire(bench.now):
                    pass
            else:
                bench.transcript.append(f"{peer}: waits")
        for pair in bench.flying:
            bench.deliver(*pair)

    each_steps_and_hears_one_message()
    each_steps_and_hears_one_message()
    bench.transcript.append("-- the link from a0 to b0 is full --")
    bench.windows["a0", "b0"] = 0
    each_steps_and_hears_one_message()
    bench.transcript.append("-- it is open again --")
    bench.open("a0", "b0")
    bench.deliver_all()
    bench.kill("a1")
    each_steps_and_hears_one_message()
    bench.transcript.append("-- training is over --")
    bench.drain()
    views = (f"{peer}: {' '.join(f'{w:.3g}' for w in bench.seats[peer].view)}" for peer in bench.live)
    return [*bench.transcript, "-- what they would serve --", *views]


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_conversation_is_the_golden_one(name: str) -> None:
    assert converse(name) == (GOLDEN / f"{name}.txt").read_text().splitlines()


def test_every_golden_file_is_of_a_strategy() -> None:
    assert {path.stem for path in GOLDEN.glob("*")} == set(EXCHANGES)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in EXCHANGES:
        (GOLDEN / f"{each}.txt").write_text("\n".join(converse(each)) + "\n")
