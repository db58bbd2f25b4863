"""``scripts/truth.py``: two runs as figures, and what counts as the same."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dlion.cli.build import Plan
from dlion.cli.simulate import run_simulation
from dlion.config import load_job, load_topology

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import truth

UNTIL_S = 6.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> truth.Facts:
    """A simulated run of six peers."""
    job = load_job("toy", {"job.until": f"{UNTIL_S}s", "evaluate.every": "1s", "exchange.name": "full"})
    out = tmp_path_factory.mktemp("truth")
    run_simulation(Plan(job, load_topology("demo"), run="truth"), out)
    return truth.facts(out, "simulate", (0.0, UNTIL_S), (0.3,))


def test_a_run_agrees_with_itself(model: truth.Facts) -> None:
    """Every line is near and differs by nothing; the counts are those of the logs."""
    lines = [*truth.lines_of(model, model), *truth.times_of([model], [model, model])]
    assert {line.what for line in lines} >= {"steps per peer", "bytes per link", "bytes of all links", "staleness p90"}
    assert all(line.near and line.difference == 0 for line in lines if line.live is not None)
    assert set(model.steps) == {"a1", "a2", "b1", "b2", "c1", "c2"} and min(model.steps.values()) > 1
    assert model.all_bytes == sum(model.link_bytes.values()) > 0


def test_only_the_span_counts(model: truth.Facts) -> None:
    out = Path(model.directory)
    late = truth.facts(out, "simulate", (UNTIL_S / 2, UNTIL_S), (0.3,))
    early = truth.facts(out, "simulate", (0.0, UNTIL_S / 2), (0.3,))
    assert {p: late.steps[p] + early.steps[p] for p in model.steps} == dict(model.steps)
    assert late.all_bytes + early.all_bytes == model.all_bytes


def test_a_difference_beyond_the_limit_is_a_miss(model: truth.Facts) -> None:
    """Two steps of twenty, a tenth of a link's bytes, a step of staleness; one step alone is none."""
    steps = dict.fromkeys(model.steps, 20)
    even = replace(model, steps=steps)
    verdict = {line.what: line.near for line in truth.lines_of(replace(even, steps=steps | {"a1": 18}), even)}
    assert not verdict["steps per peer"] and verdict["bytes per link"]
    assert next(truth.lines_of(replace(even, steps=steps | {"a1": 19}), even)).near
    link = max(model.link_bytes, key=lambda name: model.link_bytes[name])
    less = replace(model, link_bytes={**model.link_bytes, link: int(0.9 * model.link_bytes[link])})
    found = {line.what: line for line in truth.lines_of(less, model)}
    assert not found["bytes per link"].near and link in found["bytes per link"].about
    stale = replace(model, staleness={**model.staleness, "p90": model.staleness["p90"] + 1})
    assert not {line.what: line.near for line in truth.lines_of(stale, model)}["staleness p90"]


def test_time_to_target_is_judged_by_the_spread_of_the_seeds(model: truth.Facts) -> None:
    """Seeds of 9, 10, 11 s: the mean is known within 25 %; of 10, 10, 10 s within a tenth by rule."""

    def runs(*times: float | None) -> list[truth.Facts]:
        return [replace(model, time_to={"0.90": t}) for t in times]

    (line,) = truth.times_of(runs(12.0), runs(9, 10, 11))
    assert line.near and line.limit == pytest.approx(4.303 / 3**0.5 / 10, rel=1e-3)
    assert not next(truth.times_of(runs(12.0), runs(10, 10, 10))).near
    assert not next(truth.times_of(runs(None), runs(10, 10, 10))).near
    assert not list(truth.times_of(runs(None), runs(None, None)))
