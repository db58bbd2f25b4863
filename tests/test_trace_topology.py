"""Traces in a topology file: they become rates in SI units, relative to that file, and count in its digest."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from dlion.cli.planfile import Plan, decode_plan, encode_plan
from dlion.cli.topology import topology
from dlion.config import ConfigError, load_job, load_topology
from dlion.mesh.changes import changed, started
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate

DATA = Path(os.environ.get("DLION_DATA", Path(__file__).parents[1] / "../shared/data")) / "wan"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded traces at {DATA} (set DLION_DATA)")
A, B = PeerId("a1"), PeerId("b1")


def made(directory: Path, bandwidth: str, more: str = "") -> Topology:
    path = directory / "net.toml"
    path.write_text(
        'clouds = { a.members = ["a1"], b.members = ["b1"] }\n'
        f"{more}\n"
        f'[[wan]]\nbetween = ["a", "b"]\nbandwidth = {bandwidth}\n'
    )
    return load_topology(path)


def path_rate(topology: Topology) -> Rate:
    (name,) = topology.links[A, B].resources
    return topology.resources[name].rate


def test_text_trace_with_offset_scale_and_resampling(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("0 10\n1 30\n2 0\n3 20\n")
    rate = path_rate(made(tmp_path, '{ trace = "t.txt", format = "s-mbit", scale = 0.5, offset = "1s" }'))
    assert [rate.at(t) for t in (0, 1, 2, 3, 4)] == [15e6, 0, 10e6, 5e6, 15e6]
    coarse = path_rate(made(tmp_path, '{ trace = "t.txt", format = "s-mbit", resample = "2s", loop = false }'))
    assert [coarse.at(t) for t in (0, 2.5, 99)] == [20e6, 0, 20e6]


def test_csv_columns_mean_what_their_units_say(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("when,down,up\n0,100,1\n500,300,0\n")
    rate = path_rate(
        made(
            tmp_path,
            '{ trace = "t.csv", format = "csv", time = "when", time_unit = "ms", column = "down", unit = "kB/s" }',
        )
    )
    assert (rate.at(0.1), rate.at(0.6), rate.period_s) == (800e3, 2400e3, 1.0)
    speeds = made(
        tmp_path,
        '"1Mbit"',
        '[compute.a.samples_per_s]\ntrace = "t.csv"\nformat = "csv"\ntime = "when"\ntime_unit = "ms"\ncolumn = "down"',
    )
    speed = speeds.peers[A].speed
    assert speed is not None and speed.samples_per_s.at(0.1) == 100


def test_one_trace_serves_many_links_and_is_read_relative_to_the_file(tmp_path: Path) -> None:
    deep = tmp_path / "nets"
    deep.mkdir()
    (tmp_path / "t.xz").write_bytes(lzma.compress(b"0\n5\n9\n1000\n"))
    topology = made(deep, '{ trace = "../t.xz", format = "mahimahi", step = "0.5s" }')
    rates = {id(r.rate) for r in topology.resources.values()}
    assert len(topology.resources) == 2 and len(rates) == 1
    assert path_rate(topology).integral(0, 1) == pytest.approx(4 * 12_000)


def test_digest_follows_the_bytes_of_the_trace_not_its_compression(tmp_path: Path) -> None:
    def digest(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return made(tmp_path, f'{{ trace = "{name}", format = "s-mbit" }}').digest

    text = b"0 1\n1 2\n"
    plain = digest("t", text)
    assert digest("t", text) == plain
    assert digest("t", b"0 1\n1 3\n") != plain
    assert digest("u.xz", lzma.compress(text, preset=1)) == digest("u.xz", lzma.compress(text, preset=9))


@pytest.mark.parametrize(
    ("table", "content", "words"),
    [
        ('{ trace = "t", format = "s-mbit" }', "0 1\n1 x\n", ["net.toml", "wan[0].bandwidth.trace", "t:2", "'x'"]),
        ('{ trace = "none", format = "s-mbit" }', "", ["wan[0].bandwidth.trace", "none", "cannot be read"]),
        ('{ trace = "t", format = "pcap" }', "", ["wan[0].bandwidth.format", "pcap", "mahimahi"]),
        ('{ trace = "t", format = "churn", node = "n" }', "", ["wan[0].bandwidth.format", "churn", "csv"]),
        ('{ trace = "t", format = "csv", column = "b" }', "", ["wan[0].bandwidth.unit", "Mbit/s"]),
        ('{ trace = "t", format = "csv", unit = "Mbit/s" }', "", ["wan[0].bandwidth.column", "missing"]),
        ('{ trace = "t", format = "mahimahi", column = "b" }', "", ["wan[0].bandwidth.column", "only for csv"]),
        ('{ trace = "t", format = "mahimahi", offest = 1 }', "", ["wan[0].bandwidth.offest", "offset"]),
        ('{ trace = "t", format = "s-mbit" }', "0 0\n1 0\n", ["wan[0].bandwidth", "found 0"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, table: str, content: str, words: list[str]) -> None:
    (tmp_path / "t").write_text(content)
    with pytest.raises(ConfigError) as refused:
        made(tmp_path, table)
    assert [word for word in words if word not in str(refused.value)] == []


def test_churn_gives_presence(tmp_path: Path) -> None:
    (tmp_path / "churn").write_text("0,add,n1\n0,add,n2\n90000,remove,n2\n")
    topology = made(
        tmp_path, '"1Mbit"', 'presence.b1 = { trace = "churn", format = "churn", node = "n2", offset = 30 }'
    )
    there = topology.peers[B].presence
    assert there is not None and [there.at(t) for t in (0, 59, 61)] == [1, 1, 0]
    with pytest.raises(ConfigError, match="one of n1, n2"):
        made(tmp_path, '"1Mbit"', 'presence.b1 = { trace = "churn", format = "churn", node = "n3" }')


def test_a_delay_may_be_a_trace_and_goes_wherever_the_topology_goes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("when,down,rtt_half\n0,100,20\n500,300,60\n")
    delay = '{ trace = "t.csv", format = "csv", time = "when", time_unit = "ms", column = "rtt_half", unit = "ms" }'
    one = made(tmp_path, f'"1Mbit"\ndelay = {delay}')
    link = one.links[A, B]
    assert link.delay_s == pytest.approx(0.04) and link.delays_s is not None and link.way_s is link.delays_s
    assert [link.delays_s.at(t) for t in (0.1, 0.6, 1.1)] == pytest.approx([0.02, 0.06, 0.02])
    later = changed(started(one, 0.5), {"link.a-b.delay": 2.0}).links[A, B]
    assert later.delays_s is not None and later.delay_s == pytest.approx(0.08)
    assert [later.delays_s.at(t) for t in (0.1, 0.6)] == pytest.approx([0.12, 0.04])
    plan = decode_plan(encode_plan(Plan(load_job("digits"), one, "r", (1.0, 1.0))))
    assert plan.topology.links == one.links
    stepped = made(tmp_path, '"1Mbit"\ndelay = { steps = [[0, "30ms"], ["10s", "80ms"]] }').links[A, B].delays_s
    assert stepped is not None and [stepped.at(t) for t in (9, 11)] == [0.03, 0.08]
    constant = made(tmp_path, '"1Mbit"\ndelay = "30ms"').links[A, B]
    assert (constant.delay_s, constant.delays_s) == (0.03, None)


@pytest.mark.parametrize(
    ("delay", "words"),
    [
        ('{ trace = "t.csv", format = "csv", column = "x" }', ["wan[0].delay.unit", "ms"]),
        ('{ trace = "t.csv", format = "csv", column = "x", unit = "ms" }', ["wan[0].delay.trace", "t.csv:3", "'-4'"]),
        ('{ trace = "t.csv", format = "mahimahi" }', ["wan[0].delay.format", "mahimahi", "csv"]),
        ('{ steps = [[0, "5Mbit"]] }', ["wan[0].delay.steps[0][1]", "5Mbit", "duration"]),
        ('"-1ms"', ["wan[0].delay", "-1ms", "not negative"]),
    ],
)
def test_what_is_wrong_with_a_delay_is_named(tmp_path: Path, delay: str, words: list[str]) -> None:
    (tmp_path / "t.csv").write_text("time,x\n0,5\n1,-4\n")
    with pytest.raises(ConfigError) as refused:
        made(tmp_path, f'"1Mbit"\ndelay = {delay}')
    assert [word for word in words if word not in str(refused.value)] == []


@real
def test_recorded_traces_load_from_a_topology(tmp_path: Path) -> None:
    lte = path_rate(made(tmp_path, f'{{ trace = "{DATA}/mahimahi/ATT-LTE-driving.down.xz", format = "mahimahi" }}'))
    assert lte.looped and 1e6 < lte.mean < 50e6
    member = "adaptive_bitrate_streaming/data/traces/test/fcc-test/000_trace_942154_http---www.ebay.com_0"
    fcc = path_rate(made(tmp_path, f'{{ trace = "{DATA}/fcc-broadband-netllm.tar.xz::{member}", format = "s-mbit" }}'))
    assert fcc.looped and 1e5 < fcc.mean < 1e8


def test_the_topology_in_the_docs_means_what_its_comments_say(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/traces.md").read_text()
    (tmp_path / "own.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    one = load_topology(tmp_path / "own.toml")
    across = {(str(a), str(b)): link for (a, b), link in one.links.items() if a[0] != b[0]}
    assert len(one.links) == 12 and len(across) == 8
    narrowest = {ends: min(one.resources[name].rate.at(0) for name in link.resources) for ends, link in across.items()}
    assert narrowest["o1", "c1"] == narrowest["o2", "c1"] == 10e6 and narrowest["o1", "c2"] == 50e6
    assert across["o1", "c1"].resources == across["o2", "c1"].resources and across["o1", "c1"].delay_s == 0.02
    assert len(across["c1", "o1"].resources) == 2 and {one.resources[n].kind for n in across["c1", "o1"].resources} == {
        "path",
        "egress",
    }
    up = across["o2", "c1"].up
    assert up is not None and [up.at(t) for t in (0, 35, 45)] == [1, 0, 1]
    speed = one.peers[PeerId("c2")].speed
    assert speed is not None and [speed.samples_per_s.at(t) for t in (0, 60, 120)] == [300, 150, 300]


def test_a_slip_of_units_is_shown_not_rounded_away(tmp_path: Path) -> None:
    made(tmp_path, "5")  # meant: Mbit
    assert "5e-06" in CliRunner().invoke(topology, ["show", str(tmp_path / "net.toml")]).stdout
