"""``topology from-matrix``: links as measured, direction by direction; what was not measured is named, not guessed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from dlion.cli.compare import command as compare
from dlion.cli.errors import Fault
from dlion.cli.simulate import command as simulate
from dlion.cli.topology import topology
from dlion.config import ConfigError, load_topology
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.traces import TraceError

DATA = Path(os.environ.get("DLION_DATA", Path(__file__).parents[1] / "../shared/data")) / "wan"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded matrices at {DATA} (set DLION_DATA)")

GRID = "src_region,src_tier,dst_region,dst_tier,{}\n"


def made(out: Path, *args: str | Path) -> Topology:
    CliRunner().invoke(topology, ["from-matrix", *map(str, args), "--out", str(out)], catch_exceptions=False)
    return load_topology(out)


def link(one: Topology, source: str, target: str) -> tuple[float, float]:
    """Bits per second and one-way seconds."""
    found = one.links[PeerId(source), PeerId(target)]
    (name,) = found.resources
    return one.resources[name].rate.at(0), found.delay_s


@pytest.fixture
def grids(tmp_path: Path) -> tuple[Path, Path]:
    fast, slow = tmp_path / "throughput.csv", tmp_path / "latency.csv"
    fast.write_text(
        GRID.format("throughput_received")
        + "x:1,P,y:1,P,5e9\ny:1,P,x:1,P,2e9\nx:1,P,z,P,1e9\nz,P,x:1,P,1e9\nx:1,S,y:1,S,1e6\n"
    )
    slow.write_text(GRID.format("avg_rtt") + "x:1,P,y:1,P,80\ny:1,P,x:1,P,90\nx:1,P,z,P,10\nz,P,x:1,P,10\n")
    return fast, slow


def test_each_direction_has_its_own_rate_and_half_its_round_trip(grids: tuple[Path, Path], tmp_path: Path) -> None:
    given = ("--throughput", grids[0], "--latency", grids[1], "--tier", "P", "--regions", "x:1,y:1")
    one = made(tmp_path / "net.toml", *given, "--compute", "100", "--compute", "y:1=50")
    assert link(one, "x-1-1", "y-1-1") == (5e9, pytest.approx(0.040))
    assert link(one, "y-1-1", "x-1-1") == (2e9, pytest.approx(0.045))
    speeds = [peer.speed.samples_per_s.at(0) for peer in one.peers.values() if peer.speed]
    assert speeds == [100, 50]


def test_peers_of_a_region_share_its_path_when_asked(grids: tuple[Path, Path], tmp_path: Path) -> None:
    given = ("--throughput", grids[0], "--latency", grids[1], "--tier", "P", "--regions", "x:1,y:1")
    own = made(tmp_path / "own.toml", *given, "--peers-per-region", 2)
    shared = made(tmp_path / "shared.toml", *given, "--peers-per-region", 2, "--shared")
    assert (len(own.resources), len(shared.resources)) == (8, 2)
    assert len(own.links) == len(shared.links) == 12


def test_what_was_not_measured_is_named(grids: tuple[Path, Path], tmp_path: Path) -> None:
    given = ("--throughput", grids[0], "--latency", grids[1], "--tier", "P")
    with pytest.raises(Fault) as fault:
        made(tmp_path / "net.toml", *given, "--regions", "x:1,y:1,z")
    assert "throughput y:1 -> z" in fault.value.why and "latency z -> y:1" in fault.value.why
    assert not (tmp_path / "net.toml").exists()
    with pytest.raises(Fault, match="no region 'q'"):
        made(tmp_path / "net.toml", *given, "--regions", "x:1,q")


def test_a_city_matrix_needs_a_stated_bandwidth(tmp_path: Path) -> None:
    (tmp_path / "rtt.csv").write_text("avg,Oslo,Rome\nOslo,0,40\nRome,42,0\n")
    with pytest.raises(Fault, match="bandwidths are missing"):
        made(tmp_path / "net.toml", "--latency", tmp_path / "rtt.csv", "--regions", "Oslo,Rome")
    given = ("--latency", tmp_path / "rtt.csv", "--bandwidth", "20Mbit", "--regions", "Oslo,Rome")
    assert link(made(tmp_path / "net.toml", *given), "Rome-1", "Oslo-1") == (20e6, pytest.approx(0.021))
    assert "as stated, not measured" in (tmp_path / "net.toml").read_text()


def test_a_table_of_both_wants_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "both.csv").write_text("region_a,region_b,delay_ms,bandwidth_gbps\nOslo,Rome,40,0.5\n")
    given = ("--throughput", tmp_path / "both.csv", "--regions", "Oslo,Rome")
    one = made(tmp_path / "net.toml", *given)
    assert link(one, "Rome-1", "Oslo-1") == (pytest.approx(5e8), pytest.approx(0.02))  # a round trip of 40 ms
    with pytest.raises(Fault, match="says both rates and round trips"):
        made(tmp_path / "net.toml", *given, "--bandwidth", "1Mbit")
    with pytest.raises(Fault, match="found '-3'"):
        made(tmp_path / "net.toml", *given, "--compute", "-3")


def test_virtual_time_wants_a_speed_of_every_peer(tmp_path: Path) -> None:
    (tmp_path / "both.csv").write_text("region_a,region_b,delay_ms,bandwidth_gbps\nOslo,Rome,40,0.5\n")
    out = tmp_path / "net.toml"
    given = ["from-matrix", "--throughput", str(tmp_path / "both.csv"), "--regions", "Oslo,Rome", "--out", str(out)]
    assert "give --compute" in CliRunner().invoke(topology, [*given, "--compute", "Oslo=50"]).stderr
    for verb in (simulate, compare):
        with pytest.raises(ConfigError, match=r"how fast Rome-1 would be .* Add compute\.Rome\.samples_per_s"):
            CliRunner().invoke(verb, ["--topology", str(out)], catch_exceptions=False)
    assert CliRunner().invoke(topology, [*given, "--compute", "50"]).stderr == ""


def test_tiers_are_asked_for_and_named(grids: tuple[Path, Path], tmp_path: Path) -> None:
    given = ("--throughput", grids[0], "--latency", grids[1], "--regions", "x:1,y:1")
    with pytest.raises(TraceError, match="several tiers: P/P, S/S") as refused:
        made(tmp_path / "net.toml", *given)
    assert "--tier" in refused.value.advice
    with pytest.raises(TraceError, match="nothing of tier p/p; there are P/P"):
        made(tmp_path / "net.toml", *given, "--tier", "p")


@real
def test_recorded_matrices_become_topologies(tmp_path: Path) -> None:
    regions = "aws:us-east-1,azure:westeurope,gcp:asia-east1-a"
    sky = DATA / "skyplane"
    given = ("--throughput", sky / "throughput_2022-01.csv.xz", "--latency", sky / "latency_2022.csv.xz")
    one = made(tmp_path / "sky.toml", *given, "--tier", "PREMIUM", "--regions", regions)
    rate, delay_s = link(one, "aws-us-east-1-1", "azure-westeurope-1")
    assert 1e9 < rate < 1e10 and 0.03 < delay_s < 0.06
    cities = DATA / "wondernetwork-cities" / "avg_rtt_ms_matrix.csv.gz"
    made(tmp_path / "c.toml", "--latency", cities, "--bandwidth", "100Mbit", "--regions", "Amsterdam,Austin,Bangkok")
    dtfm = made(
        tmp_path / "d.toml", "--throughput", DATA / "dtfm-aws10-delay-bandwidth.csv", "--regions", "Oregon,Ohio"
    )
    assert link(dtfm, "Oregon-1", "Ohio-1") == (pytest.approx(1.1e9), pytest.approx(0.0245))
    gcp = sky / "gcp_intracloud_throughput_2022-04.csv.xz"  # names no tiers
    asked = ("--throughput", gcp, "--latency", sky / "latency_2022.csv.xz", "--tier", "PREMIUM")
    made(tmp_path / "g.toml", *asked, "--regions", "gcp:us-east1-b,gcp:asia-east1-a")
