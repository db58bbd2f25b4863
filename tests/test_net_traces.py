"""Trace files: every byte of a trace is kept, every real file loads, every bad line is named and refuses the file."""

from __future__ import annotations

import gzip
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dlion.net import matrices, traces
from dlion.net.matrices import Job, Matrix
from dlion.net.shaped import Bottleneck
from dlion.net.traces import Columns, TraceError
from dlion.net.wan import Rate

DATA = Path(os.environ.get("DLION_DATA", Path(__file__).parents[1] / "../shared/data")) / "wan"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded traces at {DATA} (set DLION_DATA)")


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_mahimahi_keeps_every_packet_whatever_the_step(tmp_path: Path) -> None:
    stamps = [0, 0, 3, 99, 100, 100, 250, 299, 300, 730, 730]
    path = written(tmp_path / "t.down", "\n".join(map(str, stamps)))
    for step in (0.01, 0.1, 0.25, 5.0):
        rate = traces.mahimahi(path, step_s=step)
        assert rate.period_s == 0.73
        assert rate.integral(0.0, 0.73) == pytest.approx(len(stamps) * 12_000)
        assert rate.integral(0.0, 73.0) == pytest.approx(100 * len(stamps) * 12_000)
    by_tenth = traces.mahimahi(path)
    assert [round(by_tenth.integral(i / 10, i / 10 + 0.1) / 12_000) for i in range(4)] == [4, 2, 2, 1]
    once = traces.read(path, "mahimahi", loop=False)
    assert once.integral(0.0, 1e6) == pytest.approx(len(stamps) * 12_000)


def test_the_text_forms_and_their_units(tmp_path: Path) -> None:
    rate = traces.read(written(tmp_path / "a", "# recorded on a train\n\n10 1.5\n12\t0\n15 3\n"), "s-mbit")
    assert rate == Rate((0.0, 2.0, 5.0), (1.5e6, 0.0, 3e6), 8.0, 0.0)
    rate = traces.read(written(tmp_path / "b", "0 500\n250 700\n"), "ms-kbit", loop=False)
    assert [rate.at(t) for t in (0.2, 0.3, 99.0)] == [500e3, 700e3, 700e3]
    rate = traces.timed(written(tmp_path / "c", "0,1\n1, 2\n"), "min", "MB/s")
    assert rate.at(30.0) == 8e6 and rate.at(61.0) == 16e6


def test_csv_columns_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "when,site,rtt,bw\n0,a,20,5\n1000,a,30,0\n3000,a,25,10\n")
    both = traces.table(path, Columns("when", "bw", "rtt", time_unit="ms", bandwidth_unit="Mbit/s"))
    assert both.bandwidth == Rate((0.0, 1.0, 3.0), (5e6, 0.0, 10e6), 5.0)
    assert both.delay_s is not None and both.delay_s.at(1.5) == 0.03
    assert traces.table(path, Columns("when", "bw")).delay_s is None


def test_compressed_files_and_archives_read_the_same(tmp_path: Path) -> None:
    content = "0 1\n1 2\n"
    plain = traces.read(written(tmp_path / "p", content), "s-mbit")
    (tmp_path / "p.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "p.xz").write_bytes(lzma.compress(content.encode()))
    with tarfile.open(tmp_path / "p.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "p", "inside/p")
    assert traces.read(tmp_path / "p.gz", "s-mbit") == plain
    assert traces.read(tmp_path / "p.xz", "s-mbit") == plain
    (member,) = traces.members(tmp_path / "p.tar.xz")
    assert member.endswith("p.tar.xz::inside/p") and traces.read(member, "s-mbit") == plain


@pytest.mark.parametrize(
    ("reader", "content", "line"),
    [
        (traces.mahimahi, "1\n2\nx\n", 3),
        (traces.mahimahi, "1\n-2\n", 2),
        (traces.mahimahi, "5\n4\n", 2),
        (traces.mahimahi, "0\n", 0),
        (traces.mahimahi, "", 0),
        (lambda p: traces.read(p, "s-mbit"), "0 1\n1 2 3\n", 2),
        (lambda p: traces.read(p, "s-mbit"), "0 1\n# fine\n1 nan\n", 3),
        (lambda p: traces.read(p, "s-mbit"), "0 1\n1 -1\n", 2),
        (lambda p: traces.read(p, "s-mbit"), "0 1\n0 2\n", 2),
        (lambda p: traces.read(p, "s-mbit"), "0 1\n", 0),
        (lambda p: traces.timed(p, "s", "furlong"), "0 1\n1 1\n", 0),
        (lambda p: traces.table(p, Columns("t", "bw")), "t,b\n0,1\n", 1),
        (lambda p: traces.table(p, Columns("t", "bw")), "t,bw\n0,1\n1\n", 3),
        (lambda p: traces.table(p, Columns("t", "bw")), "", 1),
        (traces.presence, "0,add,a\n5,add,a\n", 2),
        (traces.presence, "0,remove,a\n", 1),
        (traces.presence, "9,add,a\n5,add,b\n", 2),
        (traces.presence, "0,came,a\n", 1),
        (traces.live_count, "2021-12-10, 13:07:45, 8\n2021-12-10, 8\n", 2),
        (traces.live_count, "2021-13-10, 13:07:45, 8\n", 1),
        (matrices.undirected, "region_a,region_b,delay_ms,bandwidth_gbps\na,b,1,2\nb,a,1,2\n", 3),
        (matrices.undirected, "a,b\n", 1),
        (matrices.square, "ms,a,b\na,0,1\nb,1\n", 3),
        (matrices.square, "", 0),
        (matrices.throughput, "src_region,src_tier,dst_region,dst_tier,throughput_received\na,P,b,P,fast\n", 2),
        (matrices.throughput, "src_region,src_tier\n", 1),
        (matrices.devices, '{"k80": {\n', 2),
        (matrices.devices, '{"k80": {"x": {"null": 1}}}', 0),
        (matrices.devices, "[1]", 0),
    ],
)
def test_a_bad_line_refuses_the_file_and_is_named(
    tmp_path: Path, reader: Callable[[Path], object], content: str, line: int
) -> None:
    path = written(tmp_path / "bad", content)
    with pytest.raises(TraceError) as refused:
        reader(path)
    assert refused.value.line == line
    assert str(refused.value).startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "broken.xz").write_bytes(b"not xz")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    for name in ("absent", "broken.xz", "binary", "empty.tar::member", "absent.tar::member"):
        with pytest.raises(TraceError, match=name.partition("::")[0]):
            traces.read(tmp_path / name, "s-mbit")


def test_presence_turns_events_into_a_rate_per_node(tmp_path: Path) -> None:
    there = traces.presence(written(tmp_path / "e", "0,add,a\n2000,add,b\n5000,remove,a\n7000,add,a\n"))
    assert [there["a"].at(t) for t in (-0.5, 0.0, 4.9, 5.0, 7.0, 1e6)] == [0, 1, 1, 0, 1, 1]
    assert [there["b"].at(t) for t in (0.0, 1.9, 2.0)] == [0, 0, 1]


def test_missing_pairs_are_named_and_tiers_are_not_mixed(tmp_path: Path) -> None:
    assert Matrix({("a", "b"): 1.0, ("b", "a"): 1.0, ("a", "c"): 1.0}).missing(["a", "b", "c"]) == [
        ("b", "c"),
        ("c", "a"),
        ("c", "b"),
    ]
    header = "src_region,src_tier,dst_region,dst_tier,throughput_received\n"
    path = written(tmp_path / "grid", header + "a,P,b,P,4\na,P,b,P,6\na,P,b,S,1\n")
    assert matrices.throughput(path, tiers=("P", "P")).values == {("a", "b"): 5.0}
    with pytest.raises(TraceError, match="several tiers: P/P, P/S"):
        matrices.throughput(path)
    with pytest.raises(TraceError, match="nothing of tier X/X"):
        matrices.throughput(path, tiers=("X", "X"))


@real
def test_every_recorded_mahimahi_trace_loads() -> None:
    files = sorted((DATA / "mahimahi").glob("*.xz"))
    assert len(files) >= 13
    for path in files:
        rate = traces.mahimahi(path)
        lines = len(traces.text(path).split())
        assert 100 < rate.period_s < 1100
        assert rate.integral(0.0, rate.period_s) == pytest.approx(lines * 12_000, rel=1e-12)


@real
def test_every_broadband_trace_loads(tmp_path: Path) -> None:
    files = traces.members(DATA / "fcc-broadband-netllm.tar.xz")
    assert len(files) == 485
    with tarfile.open(DATA / "fcc-broadband-netllm.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    hours = 0.0
    for path in files:
        rate = traces.read(tmp_path / path.partition("::")[2], "s-mbit")
        hours += rate.period_s / 3600
        assert 1e3 < rate.mean < 1e9
    assert 60 < hours < 70
    assert traces.read(files[-1], "s-mbit") == rate


@real
def test_every_matrix_loads() -> None:
    sky = DATA / "skyplane"
    premium = ("PREMIUM", "PREMIUM")
    january = matrices.throughput(sky / "throughput_2022-01.csv.xz", tiers=premium)
    assert len(january.names) == 63 and 0.1e9 < min(january.values.values()) < max(january.values.values()) < 29e9
    assert len(matrices.throughput(sky / "throughput_2022-11-28.csv.xz").values) == 4970
    assert len(matrices.throughput(sky / "gcp_intracloud_throughput_2022-04.csv.xz").values) == 27 * 26
    rtt = matrices.round_trips(sky / "latency_2022.csv.xz", tiers=premium)
    assert 0.0005 < min(rtt.values.values()) < max(rtt.values.values()) < 0.5
    assert not rtt.missing(["aws:us-east-1", "gcp:europe-west3-a"])
    assert matrices.skyplane(sky / "egress_cost_usd_per_gb.csv.xz", "cost").values["aws:af-south-1", "aws:ap-east-1"]
    cities = matrices.square(DATA / "wondernetwork-cities/avg_rtt_ms_matrix.csv.gz")
    assert len(cities.names) == 242 and cities.values["Adelaide", "Albany"] == pytest.approx(0.26675)
    grid = matrices.undirected(DATA / "dtfm-aws10-delay-bandwidth.csv")
    assert len(grid.bandwidth.names) == 10 and not grid.round_trip_s.missing(grid.round_trip_s.names)
    assert grid.bandwidth.values["Tokyo", "Oregon"] == 0.523e9 and grid.round_trip_s.values["Oregon", "Tokyo"] == 0.096
    assert grid.round_trip_s.values["Oregon", "Tokyo"] == pytest.approx(
        rtt.values["aws:us-west-2", "aws:ap-northeast-1"], rel=0.05
    )


@real
def test_churn_and_device_tables_load() -> None:
    archive = f"{DATA}/churn/bamboo-spot-traces.tar.xz::traces/"
    p3 = traces.presence(archive + "p3-trace.csv")
    assert len(p3) == 177 and sum(rate.at(3600.0) for rate in p3.values()) > 10
    assert len(traces.presence(archive + "g4dn-trace.csv")) == 79
    for name in ("a100x1-east1b", "v100x1-east1c"):
        live = traces.live_count(f"{archive}gcloud/{name}.txt")
        assert live.starts[-1] > 20 * 3600 and max(live.values) in (64, 80)
    for path in sorted((DATA / "device").glob("*.xz")):
        speeds = matrices.devices(path)
        job = Job("ResNet-18", 16, 1)
        assert 0 < speeds["k80"][job] < speeds["v100"][job]


@real
def test_a_saturated_lte_trace_delivers_what_was_recorded() -> None:
    """Ten minutes over a real LTE trace with outages: the bottleneck loses nothing and gives nothing away."""
    rate = traces.mahimahi(DATA / "mahimahi/TMobile-LTE-driving.down.xz")
    bottleneck, now, sent = Bottleneck(rate), 0.0, 0
    while now < 600.0:
        now = bottleneck.reserve(now, 20_000)
        sent += 160_000
        assert sent <= rate.integral(0.0, now) + 1e-3
    assert sent - 160_000 >= 0.99 * rate.integral(0.0, 600.0)
