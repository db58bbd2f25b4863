"""Accuracy is measured beside the run, by whoever started it, and a fault there is told and stops nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from live_runs import dlion

from dlion.cli.host import SNAPSHOTS
from dlion.cli.measure import measuring
from dlion.observe.read import read_directory
from dlion.observe.summary import evaluations


@pytest.mark.timeout(60)
def test_a_peer_by_itself_knows_its_accuracy(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text('[clouds]\nx.members = ["x1"]\n')
    out = tmp_path / "out"
    (tmp_path / "x1.toml").write_text(
        f'name = "x1"\ntopology = "one.toml"\njob = "digits"\nlisten = "127.0.0.1:0"\nout = "{out}"\n'
    )
    with dlion("peer", str(tmp_path / "x1.toml"), "--until", "4s", "--set", "evaluate.every=1") as life:
        told = life.communicate(timeout=50)[1]
    assert life.returncode == 0, told
    assert "accuracy 0.9" in told.splitlines()[-1], told
    _, accuracies = evaluations(read_directory(out).peers["x1"], "accuracy")
    assert accuracies.size and accuracies[-1] > 0.9
    assert not list((out / SNAPSHOTS).iterdir())


def test_what_cannot_be_measured_is_told_and_stops_nothing(tmp_path: Path) -> None:
    heard: list[float] = []
    told: list[str] = []

    async def main() -> str:
        async with measuring(tmp_path / "nowhere", lambda _, accuracy: heard.append(accuracy), told.append):
            await asyncio.sleep(0)
        return "went on"

    assert asyncio.run(main()) == "went on"
    assert not heard and told[0].startswith("accuracy is not measured:") and "plan.json" in told[0]
