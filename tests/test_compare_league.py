"""The league: medians and ranges say what the cells say, failures are named, and worker count changes no hash."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from dlion.cli import engines
from dlion.cli.compare import cells_of, command, outcome_of, read_results
from dlion.cli.errors import Fault
from dlion.config import ConfigError
from dlion.observe.league import Outcome, Spread, accuracy_at, league, spread, table

SMALL = ["--job", "toy", "--topology", "hetero-system", "--until", "4s", "--set", "evaluate.every=1s"]


def compare(out: Path, *more: str) -> Result:
    return CliRunner().invoke(command, [*SMALL, "--out", str(out), "--json", *more], catch_exceptions=False)


def rows(result: Result) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(result.stdout)["rows"]
    return found


# -- figures ------------------------------------------------------------------------------------------------------


def test_never_is_later_than_any_time() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3, 3)
    assert spread([3.0, None, 2.0]) == Spread(3.0, 2.0, None, 2, 3)
    assert spread([None, None, 2.0]) == Spread(None, 2.0, None, 1, 3)
    assert spread([]) == Spread(None, None, None, 0, 0)


def test_accuracy_at_a_time_is_interpolated_held_at_the_end_and_unknown_before() -> None:
    one = Outcome(key="k", exchange="x", seed=0, until_s=9, curve=[(2.0, 0.5), (4.0, 0.7)])
    assert [accuracy_at(one, t) for t in (1, 2, 3, 9)] == [None, 0.5, pytest.approx(0.6), 0.7]


# -- the matrix ---------------------------------------------------------------------------------------------------


def test_same_hashes_with_one_worker_and_two_and_as_simulated_alone(tmp_path: Path) -> None:
    one = rows(compare(tmp_path / "1", "--exchange", "dlion,ako", "--seeds", "2", "--workers", "1"))
    two = rows(compare(tmp_path / "2", "--exchange", "dlion,ako", "--seeds", "2", "--workers", "2"))
    assert one == two
    assert [row["exchange"] for row in two] == ["dlion", "ako"]
    hashes = [digest for row in two for digest in row["log_sha256"].values()]  # type: ignore[attr-defined]
    assert len(set(hashes)) == 4 and all(hashes)
    from dlion.cli.simulate import command as simulate

    alone = CliRunner().invoke(simulate, [*SMALL, "--exchange", "dlion", "--seed", "1", "--json"])
    assert json.loads(alone.stdout)["log_sha256"] == two[0]["log_sha256"]["1"]  # type: ignore[index]


def test_a_finished_cell_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(tmp_path, "--exchange", "dlion", "--seeds", "1")
    lines = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(lines + b'{"key": "torn')
    asked: list[str] = []
    monkeypatch.setattr(engines, "on_processes", lambda plans, workers: asked.extend(plans) or iter(()))
    again = compare(tmp_path, "--exchange", "dlion", "--seeds", "1")
    assert rows(again) == rows(first) and not asked
    assert (tmp_path / "results.jsonl").read_bytes() == lines


def test_a_failed_cell_is_reported_not_averaged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_fails(plans: dict[str, bytes], workers: int) -> object:
        for i, (key, plan) in enumerate(plans.items()):
            yield key, engines.Failure("killed by signal 9") if i == 1 else engines.run_bytes(plan)

    with monkeypatch.context() as patched:
        patched.setattr(engines, "on_processes", second_fails)
        with pytest.raises(Fault, match="1 of 2 runs failed") as fault:
            compare(tmp_path, "--exchange", "dlion", "--seeds", "2")
    assert "dlion, seed 1: killed by signal 9" in fault.value.why
    outcomes = list(read_results(tmp_path / "results.jsonl").values())
    (row,) = league(outcomes, [4.0])
    assert row.seeds == [0] and row.failed == {1: "killed by signal 9"} and row.wan_bytes.of == 1
    monkeypatch.setattr(
        engines, "on_processes", lambda plans, workers: ((k, engines.run_bytes(p)) for k, p in plans.items())
    )
    (healed,) = rows(compare(tmp_path, "--exchange", "dlion", "--seeds", "2"))
    assert healed["seeds"] == [0, 1] and not healed["failed"]


def test_a_cell_that_dies_in_its_process_says_why() -> None:
    ((key, result),) = engines.on_processes({"k": b"no plan"}, 1)
    assert key == "k" and isinstance(result, engines.Failure)
    assert "exit code 65" in result.why and "damaged plan" in result.why


def test_damage_in_the_middle_of_the_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(b"nonsense\n{}\n")
    with pytest.raises(Fault, match="damaged results"):
        read_results(tmp_path / "results.jsonl")


def test_all_cells_are_checked_before_the_first_one_runs() -> None:
    options: dict[str, object] = {
        "job": "toy", "topology": "hetero-system", "exchange": "dlion,nonsense", "sets": (),
        "talk": None, "start": None,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="nonsense"):
        cells_of(options, 1)
    keys = list(cells_of({**options, "exchange": "dlion"}, 2)) + list(
        cells_of({**options, "exchange": "dlion", "sets": ("link.a-b.bandwidth=x0.5",)}, 1)
    )
    assert len(set(keys)) == 3, "another seed or another network is another cell"


def test_table_marks_the_best_and_leaves_out_what_nobody_reached(tmp_path: Path) -> None:
    cells = cells_of({"job": "toy", "topology": "hetero-system", "exchange": "dlion,ako", "sets": ("job.until=2",),
                      "talk": None, "start": None}, 1)  # fmt: skip
    outcomes = [outcome_of(key, plan, engines.run_bytes(_encoded(plan))) for key, plan in cells.items()]
    assert msgspec.json.decode(msgspec.json.encode(outcomes[0]), type=Outcome) == outcomes[0]
    columns = {column.title: column for column in table(league(outcomes, [2.0]))}
    assert not [title for title in columns if title.startswith("to ")]
    medians = [s.median for s in columns["WAN"].spreads]
    assert columns["WAN"].best == min(m for m in medians if m is not None)


def _encoded(plan: object) -> bytes:
    from dlion.cli.build import Plan
    from dlion.cli.planfile import encode_plan

    assert isinstance(plan, Plan)
    return encode_plan(plan)


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    compare(tmp_path, "--exchange", "dlion", "--seeds", "1")
    text = (tmp_path / "league.html").read_text()
    assert (
        "<svg" in text
        and "default-src 'none'" in text
        and "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    )
    assert (tmp_path / "league.png").read_bytes().startswith(b"\x89PNG")
