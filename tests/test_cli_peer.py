"""``dlion peer`` as its user meets it: who is awaited, what is refused before anything is overwritten, exit codes."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from live_runs import dlion

from dlion import cli
from dlion.cli import errors
from dlion.cli.build import Plan, identity_of, workload_of
from dlion.config import load_job, load_topology
from dlion.identity import Identity
from dlion.mesh.topology import Topology
from dlion.messages import PeerId

FILE = """
name = "west"
topology = "three-hosts"
job = "toy"
listen = "127.0.0.1:{listen}"
admin = "127.0.0.1:{admin}"
out = "run"
[peers]
north = "127.0.0.1:{nobody}"
south = ""
"""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is in use, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("key", ["listen", "admin"])
def test_a_port_in_use_is_said_and_passes(key: str, host: Path, taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A supervisor may start the peer again; until then the run that lies there keeps its plan."""
    (host / "west.toml").write_text(FILE.format(**{"listen": 0, "admin": 0, "nobody": taken, key: taken}))
    (host / "run").mkdir()
    (host / "run" / "plan.json").write_text("another run's")
    assert cli.main(["peer", "west.toml"]) == errors.TEMPORARY
    told = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{taken}" in told and f"where: {key}" in told and "already in use" in told
    assert (host / "run" / "plan.json").read_text() == "another run's"


def test_a_name_that_does_not_resolve_passes_too(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FILE.format(listen=0, admin=0, nobody=1).replace('listen = "127.0.0.1:0"', 'listen = "no.such.invalid:7100"')
    (host / "west.toml").write_text(f"insecure_plaintext = true\n{text}")
    assert cli.main(["peer", "west.toml"]) == errors.TEMPORARY
    assert "cannot listen on no.such.invalid:7100" in capsys.readouterr().err


def test_plaintext_off_loopback_is_refused(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FILE.format(listen=0, admin=0, nobody=1).replace(
        'listen = "127.0.0.1:0"', 'listen = "0.0.0.0:0"\nadvertise = "a:1"'
    )
    (host / "west.toml").write_text(text)
    assert cli.main(["peer", "west.toml"]) == errors.REFUSED
    assert "set insecure_plaintext = true in the peer file" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_told_as_such(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (host / "west.toml").write_text(FILE.format(listen=0, admin=0, nobody=1))
    (host / "run").write_text("a file")
    assert cli.main(["peer", "west.toml"]) == errors.CANNOT_WRITE
    assert "cannot write the run's files" in capsys.readouterr().err


def test_who_waits_says_for_whom_and_may_be_stopped(host: Path, taken: int) -> None:
    (host / "west.toml").write_text(FILE.format(listen=0, admin=0, nobody=taken))
    with dlion("peer", "west.toml", "--no-evaluate") as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("waits for"))
        process.send_signal(signal.SIGTERM)
        told = process.stderr.read()
        process.wait(30)
    assert line == f"waits for north (127.0.0.1:{taken}), south (dials us); 60 s at most\n"
    assert process.returncode == 0 and "west: 0 steps, SIGTERM" in told


def test_peers_of_other_micro_clouds_or_another_talk_are_not_of_the_run() -> None:
    """Their plans of bridges would differ, and updates be lost or told twice. Rates, addresses: to each its own."""

    def seen(topology: Topology) -> Identity:
        plan = Plan(job, topology, "run")
        return identity_of(plan, PeerId("west"), workload_of(plan, PeerId("west")), 1)

    job, mesh = load_job("toy"), load_topology("three-hosts")
    moved = replace(mesh, peers={**mesh.peers, PeerId("south"): replace(mesh.peers[PeerId("south")], cloud="w")})
    assert len({seen(t).job for t in (mesh, replace(mesh, talk="bridges"), moved)}) == 3
    assert seen(replace(mesh, links={}, addresses={}, about="other")) == seen(mesh)
