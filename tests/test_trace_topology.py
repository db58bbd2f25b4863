"""Traces in a topology file: they become rates in SI units, relative to that file, and count in its digest."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

import pytest

from dlion.config import ConfigError, load_topology
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


@real
def test_recorded_traces_load_from_a_topology(tmp_path: Path) -> None:
    lte = path_rate(made(tmp_path, f'{{ trace = "{DATA}/mahimahi/ATT-LTE-driving.down.xz", format = "mahimahi" }}'))
    assert lte.looped and 1e6 < lte.mean < 50e6
    member = "adaptive_bitrate_streaming/data/traces/test/fcc-test/000_trace_942154_http---www.ebay.com_0"
    fcc = path_rate(made(tmp_path, f'{{ trace = "{DATA}/fcc-broadband-netllm.tar.xz::{member}", format = "s-mbit" }}'))
    assert fcc.looped and 1e5 < fcc.mean < 1e8
