"""The summary: every figure checked against one worked out by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from observe_runs import SIX, peer_events

from dlion.cli.show import show_summary
from dlion.observe import runlog
from dlion.observe.read import PeerLog, Run
from dlion.observe.report.series import accuracy_band
from dlion.observe.summary import Summary, mean_accuracy, summarise, time_to


def header(peer: str, cloud: str = "a") -> runlog.Header:
    return runlog.Header(
        t=0.0,
        version="1",
        run="r",
        peer=peer,
        cloud=cloud,
        incarnation=1,
        seed=7,
        config="c",
        exchange="full",
        job="toy",
        topology="pair",
        model="m",
        model_bytes=4,
    )


def run_of(**events: list[runlog.Event]) -> Run:
    return Run("r", {peer: PeerLog.of([header(peer), *held]) for peer, held in events.items()})


def step(t: float, n: int, waited: float = 0.0) -> runlog.Step:
    return runlog.Step(t=t, n=n, loss=1.0, samples=8, lr=0.1, seconds=1.0, waited=runlog.Waited(pace=waited))


def evaluation(t: float, accuracy: float, which: str = "view") -> runlog.Eval:
    return runlog.Eval(t=t, step=0, accuracy=accuracy, loss=1.0, samples=10, which=which)


def send(nbytes: int, wan: bool) -> runlog.Send:
    return runlog.Send(t=1.0, to="b", seq=0, kind="g", bytes=nbytes, wan=wan)


def heard(origin: str, theirs: int, mine: int) -> runlog.Apply:
    return runlog.Apply(t=1.0, origin=origin, hop=origin, seq=0, step=theirs, mine=mine)


def test_every_figure_by_hand() -> None:
    run = run_of(
        a=[
            step(1.0, 0),
            step(4.0, 1, waited=2.0),
            send(100, True),
            send(7, False),
            heard("b", 0, 4),
            heard("a", 0, 9),
            heard("b", 5, 2),
            runlog.Batch(t=0.5, size=8, global_size=16),
            evaluation(1.0, 0.2),
            evaluation(2.0, 0.6),
            evaluation(3.0, 0.0, "replica"),
        ],
        b=[
            step(1.0, 0),
            send(30, True),
            evaluation(1.0, 0.4),
            evaluation(2.0, 0.8),
            runlog.End(t=5.0, steps=1, reason="until (drain cut short)", overrun=0.03, void=True),
        ],
    )
    summary = summarise(run, wall_seconds=0.5, log_sha256="00", replica_disagreement=0.25, targets=(0.5, 0.9))
    assert summary == {
        "exchange": "full",
        "job": "toy",
        "topology": "pair",
        "seed": 7,
        "virtual_seconds": 5.0,
        "drain_seconds": 1.0,
        "cut_short": ["b"],
        "wall_seconds": 0.5,
        "accuracy": {"mean": pytest.approx(0.8), "worst": 0.8, "per_peer": {"a": 0.6, "b": 0.8}},
        "time_to": {"0.50": pytest.approx(1.5), "0.90": None},
        "wan_bytes": 130,
        "lan_bytes": 7,
        "steps": {"a": 2, "b": 1},
        "stalled_share": {"a": 0.5, "b": 0.0},
        "staleness": {"p50": 1.5, "p90": pytest.approx(2.7), "p99": pytest.approx(2.97), "max": 3},
        "samples": 24,
        "batch": {"all": 16, "per_peer": {"a": 8, "b": 8}},
        "refused": 0,
        "replica_disagreement": 0.25,
        "overrun": 0.03,
        "void": True,
        "log_sha256": "00",
    }


def test_a_drain_a_cut_and_refusals_are_told_and_older_summaries_still_read(capsys: pytest.CaptureFixture[str]) -> None:
    refused = runlog.Refuse(t=2.0, peer="b", reason="it is not training")
    end = runlog.End(t=5.0, steps=1, reason="until (drain cut short)")
    run = run_of(a=[step(1.0, 0), refused], b=[step(2.0, 0), end])
    assert [summarise(run, until_s=t).get("drain_seconds") for t in (1.5, 4.0, 60.0)] == [3.0, 1.0, 0.0]
    summary = summarise(run)
    show_summary(summary, as_json=False)
    told = capsys.readouterr().out
    assert "5.0 s, of these 3.0 s drain" in told and "b stopped before all had" in told and "refused" in told
    earlier = {key: value for key, value in summary.items() if key not in ("drain_seconds", "cut_short")}
    show_summary(msgspec.convert(earlier, Summary), as_json=False)
    told = capsys.readouterr().out
    assert "5.0 s\n" in told and "drain" not in told


def test_steps_done_again_after_a_resume_count_once() -> None:
    """Killed after step 5, gone on from a checkpoint before step 3; then started over, which gives all of it up."""
    first = [step(1.0 + n, n) for n in range(6)]
    again = [step(4.5 + n, 3 + n, waited=0.5) for n in range(4)]
    assert summarise(run_of(a=[header("a"), *first, *again]))["steps"] == {"a": 7}
    found = summarise(run_of(a=[header("a"), *first, *again, step(1.0, 0), step(2.0, 1)]))
    assert found["steps"] == {"a": 2} and found["samples"] == 16 and found["stalled_share"] == {"a": 0.0}


def test_an_empty_run_has_a_summary_of_plain_json() -> None:
    summary = summarise(run_of(a=[]))
    assert json.loads(json.dumps(summary)) == summary
    assert summary["accuracy"] == {"mean": None, "worst": None, "per_peer": {}}
    assert set(summary["time_to"].values()) == {None}


def test_a_synthetic_run_gives_plain_json_too() -> None:
    run = Run("r", {peer: PeerLog.of(peer_events(peer, SIX, 5.0)) for peer in SIX})
    summary = summarise(run)
    assert json.loads(json.dumps(summary)) == summary


def test_peers_that_evaluate_at_other_times_meet_on_one_grid() -> None:
    early = [evaluation(float(t), t / 10) for t in range(0, 11)]
    late = [evaluation(t + 0.5, (t + 0.5) / 10) for t in range(0, 10)]
    times, mean = mean_accuracy(run_of(a=early, b=late))
    assert np.allclose(np.diff(times), 1.0)
    inside = (times >= 2) & (times <= 8)
    assert np.allclose(mean[inside], times[inside] / 10)


def test_who_died_or_came_late_counts_only_while_it_was_there() -> None:
    """Else a peer killed early would hold the curve down to the end, and a late one would lift its beginning."""
    whole = [evaluation(float(t), 0.8) for t in range(10)]
    died, late = ([evaluation(float(t), 0.2) for t in when] for when in (range(3), range(8, 10)))
    times, mean = mean_accuracy(run_of(a=whole, b=died, c=late))
    assert times.size == 10
    np.testing.assert_allclose(mean[[0, 9]], [0.5, 0.5])
    np.testing.assert_allclose(mean[5], 0.8)
    np.testing.assert_allclose(accuracy_band(run_of(a=whole, b=died, c=late)).worst[[0, 5, 9]], [0.2, 0.8, 0.2])


def test_smoothing_takes_one_outlier_down_to_a_third() -> None:
    flat = [evaluation(float(t), 0.9 if t == 5 else 0.0) for t in range(10)]
    _, mean = mean_accuracy(run_of(a=flat))
    assert mean.max() == pytest.approx(0.3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1))
def test_time_to_lies_where_the_curve_first_reaches_the_target(values: list[float], target: float) -> None:
    curve = (np.arange(len(values), dtype=np.float64), np.array(values))
    when = time_to(curve, target)
    if max(values) < target:
        assert when is None
        return
    assert when is not None
    assert np.interp(when, *curve) == pytest.approx(target) or (when == 0 and values[0] >= target)
    assert all(v < target for t, v in zip(*curve, strict=True) if t < np.floor(when))
    assert all(a <= b for a, b in pairwise([0.0, when]))
