"""``dlion trace show``: figures over time, not over lines; every recorded file is summarised; bad ones are refused."""

from __future__ import annotations

import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from dlion.cli.errors import Fault, fault_of
from dlion.cli.trace import trace
from dlion.net.traces import TraceError, members
from dlion.net.wan import Rate
from dlion.observe.tracefacts import facts, total

DATA = Path(os.environ.get("DLION_DATA", Path(__file__).parents[1] / "../shared/data")) / "wan"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded traces at {DATA} (set DLION_DATA)")


def shown(*args: str) -> dict[str, object]:
    result = CliRunner().invoke(trace, ["show", *args, "--json"], catch_exceptions=False)
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_facts_weigh_values_by_their_time() -> None:
    rate = Rate.steps([0, 1, 10, 11, 12], [8, 2, 0, 0, 4], loop=True, period_s=20)
    found = facts(rate)
    assert (found.duration_s, found.steps, found.low, found.high) == (20, 5, 0, 8)
    assert found.mean == pytest.approx((8 + 18 + 32) / 20)
    assert found.percentiles == {"p5": 0, "p25": 2, "p50": 2, "p75": 4, "p95": 4}
    assert (found.outages, found.outage_s, found.longest_outage_s) == (1, 2, 2)


def test_constants_have_no_duration() -> None:
    found = facts(Rate.constant(5))
    assert (found.duration_s, found.mean, found.percentiles["p50"], found.outages) == (0, 5, 5, 0)


def test_presence_adds_up() -> None:
    two = total([Rate.steps([-1, 0, 5], [0, 1, 0], loop=False), Rate.steps([-1, 2], [0, 1], loop=False)])
    assert [two.at(t) for t in (0, 3, 6)] == [1, 2, 1]


def test_formats_that_tell_themselves_and_one_that_does_not(tmp_path: Path) -> None:
    (tmp_path / "packets").write_text("1\n2\n2\n1000\n")
    assert shown(str(tmp_path / "packets"))["format"] == "mahimahi"
    (tmp_path / "churn").write_text("0,add,n\n900,remove,n\n")
    assert shown(str(tmp_path / "churn"))["unit"] == "peers present"
    (tmp_path / "pairs").write_text("0 1\n1 2\n")
    with pytest.raises(Fault, match="does not say"):
        shown(str(tmp_path / "pairs"))
    assert shown(str(tmp_path / "pairs"), "--format", "s-mbit")["mean"] == 1.5e6
    (tmp_path / "table").write_text("t,down\n0,4\n1,8\n")
    with pytest.raises(Fault, match="several columns") as refused:
        shown(str(tmp_path / "table"))
    assert "t, down with --column" in str(refused.value.advice)
    (tmp_path / "speeds.json").write_text('{"v100": {"(A, 1)": 3.5}}')
    prose = tmp_path / "readme"
    prose.write_text("Sites are far, and few\nor near\n")
    with pytest.raises(Fault, match="of no known format: 'Sites are far, and few'"):
        shown(str(prose))
    (tmp_path / "nothing").write_text("# only a word\n")
    with pytest.raises(Fault, match="an empty file"):
        shown(str(tmp_path / "nothing"))
    with pytest.raises(Fault, match="JSON is no trace"):
        shown(str(tmp_path / "speeds.json"))
    (tmp_path / "delays").write_text("t,one_way\n0,20\n1,30\n")
    found = shown(str(tmp_path / "delays"), "--time", "t", "--column", "one_way", "--unit", "ms")
    assert (found["mean"], found["unit"], found["scale"]) == (pytest.approx(0.025), "ms", 1e-3)
    assert shown(str(tmp_path / "table"), "--time", "t", "--column", "down", "--unit", "kbit/s")["mean"] == 6e3


def test_bad_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("0 1\n1 x\n")
    with pytest.raises(TraceError, match=r"bad:2: .*'x'"):
        shown(str(tmp_path / "bad"), "--format", "s-mbit")


def test_what_to_do_fits_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("t,down\n0,4\n1,x\n")
    (tmp_path / "plain.gz").write_text("1\n2\n")
    (tmp_path / "cut.xz").write_bytes(lzma.compress(b"1\n2\n" * 99)[:-20])
    with tarfile.open(tmp_path / "some.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "table.csv", "table.csv")
    csv = ("--time", "t", "--column", "down")
    for name, args, what, advice in (
        ("gone.csv", (), "cannot be read: No such file", "may read"),
        ("table.csv", ("--column", "down"), "no column 'time'", "--time"),
        ("table.csv", csv, ":3: ", "mend this line"),
        ("plain.gz", (), "cannot be unpacked", "as it is packed"),
        ("cut.xz", (), "cannot be unpacked", "fetch it again"),
        ("some.tar.xz::other", (), "no file 'other' in it", "trace show"),
    ):
        with pytest.raises(TraceError) as refused:
            shown(str(tmp_path / name), *args)
        fault = fault_of(refused.value)
        assert fault is not None and what in fault.what and "Errno" not in fault.what
        assert advice in fault.advice, name


def test_the_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    (tmp_path / "t").write_text("0 1\n1 2\n3 0\n4 9\n")
    shown(str(tmp_path / "t"), "--format", "s-mbit", "--png", str(tmp_path / "t.png"))
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@real
def test_recorded_traces_are_summarised() -> None:
    for path in sorted((DATA / "mahimahi").glob("*.xz")):
        found = shown(str(path))
        assert found["format"] == "mahimahi" and 1e5 < float(str(found["mean"])) < 50e6, path
    for member in members(DATA / "churn" / "bamboo-spot-traces.tar.xz"):
        found = shown(member)
        assert found["unit"] == "peers present" and float(str(found["high"])) > 1, member
