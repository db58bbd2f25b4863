"""Mistakes of users of the verbs that read files: one error that says what, where and what to do, and its exit code."""

from __future__ import annotations

import shutil
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dlion import cli
from dlion.cli import engines
from dlion.cli.errors import BAD_DATA, CANNOT_READ, CANNOT_WRITE, CONFIGURATION, NO_PEER, USAGE, Fault

GRID = "src_region,src_tier,dst_region,dst_tier,avg_rtt\nx,P,y,P,80\ny,P,x,P,90\n"
Said = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["simulate", "--job", "toy", "--topology", "demo", "--until", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """(exit code, stderr) of a command line, typed where there are files to be mistaken for others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(b"\xd8\x00\xff")
    (tmp_path / "dir").mkdir()
    (tmp_path / "latency.csv").write_text(GRID)
    (tmp_path / "two").write_text("0 5\n1 7\n")
    (tmp_path / "rates.csv").write_text("time,down\n0,4\n1,5\n")

    def call(line: str) -> tuple[int, str]:
        code = cli.main(line.split())
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return code, told

    return call


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("gone", CANNOT_READ, ("gone: cannot be read: No such file", "name a file that this user may read")),
        ("dir", CANNOT_READ, ("dir: cannot be read: Is a directory", "name a file")),
        ("empty", BAD_DATA, ("an empty file", "give another file")),
        ("empty --format mahimahi", BAD_DATA, ("empty: no packet later", "give another file")),
        ("bytes", BAD_DATA, ("bytes: not text", "fetch it again")),
        ("bytes.tar.xz", BAD_DATA, ("bytes.tar.xz: cannot be unpacked: file could not be opened successfully\n",)),
        ("mixed", BAD_DATA, ("line 3 is of no known format: 'x'", "where: mixed", "docs/traces.md")),
        ("rates.csv --column down --unit ells", USAGE, ("--unit", "'ells' is not one of", "'Mbit/s'")),
        ("rates.csv --column down --time-unit ells", USAGE, ("--time-unit", "'ells' is not one of")),
        ("two --format s-mbit --png nowhere/x.png", CANNOT_WRITE, ("cannot write", "nowhere/x.png", "another place")),
    ],
)
def test_trace_show(said: Said, line: str, code: int, words: tuple[str, ...]) -> None:
    Path("bytes.tar.xz").write_bytes(b"\xd8\x00\xff")
    Path("mixed").write_text("1\n2\nx\n")
    if line.endswith(".png"):
        pytest.importorskip("matplotlib")
    found, told = said(f"trace show {line}")
    assert found == code and all(word in told for word in words), told


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("--bandwidth 5ells --regions x,y", USAGE, ("--bandwidth: found '5ells'", 'a rate like "50Mbit"')),
        ("--bandwidth -5 --regions x,y", USAGE, ("--bandwidth: found '-5'", "above 0")),
        ("--bandwidth 0 --regions x,y", USAGE, ("--bandwidth: found '0'", "above 0")),
        ("--bandwidth 5 --regions x,z", BAD_DATA, ("no region 'z'", "where: latency.csv", "it has x, y")),
        ("--throughput gone --regions x,y", CANNOT_READ, ("gone: cannot be read", "name a file")),
        ("--bandwidth 5 --latency two --regions x,y", BAD_DATA, ("two:1: expected the names of the columns",)),
        ("--bandwidth 5 --latency empty --regions x,y", BAD_DATA, ("empty: an empty matrix", "give another file")),
        ("--bandwidth 5 --latency bytes --regions x,y", BAD_DATA, ("bytes: not text",)),
        ("--bandwidth 5 --regions x,y --out nowhere/net.toml", CANNOT_WRITE, ("cannot write", "nowhere/net.toml")),
    ],
)
def test_from_matrix(said: Said, line: str, code: int, words: tuple[str, ...]) -> None:
    found, told = said(f"topology from-matrix --latency latency.csv --out net.toml {line}")
    assert found == code and all(word in told for word in words), told
    assert not Path("net.toml").exists()


@pytest.mark.parametrize("verb", ["record --out out", "replay", "explain --no-replay"])
@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        ("gone", CANNOT_READ, ("where: gone", "No such file", "check the path")),
        ("empty", USAGE, ("'empty' is a file",)),
        ("dir", BAD_DATA, ("dir: no run log", "dlion simulate --out")),
        ("run/a1.jsonl", BAD_DATA, ("run/a1.jsonl, line 1: ", "copy it again")),
        ("run/plan.json", BAD_DATA, ("a damaged plan", "where: run/plan.json", "copy it again")),
        ("run/a1.host.json", BAD_DATA, ("run/a1.host.json: ", "copy it again")),
    ],
)
def test_a_runs_directory(said: Said, run: Path, verb: str, spoil: str, code: int, words: tuple[str, ...]) -> None:
    shutil.copytree(run, "run")
    if "/" in spoil:
        Path(spoil).write_text("{\n")
    found, told = said(f"{verb} {spoil.partition('/')[0]}")
    assert found == code and all(word in told for word in words), told


def test_a_peer_without_a_log_is_named(said: Said, run: Path) -> None:
    shutil.copytree(run, "run")
    Path("run/b2.jsonl").unlink()
    assert said("explain --no-replay run") == (0, "no log of b2 in run: what they did is not told\n")
    code, told = said("record run --out out")
    assert code == BAD_DATA and "no log of b2" in told and "where: run" in told


@pytest.mark.parametrize(
    "line",
    [
        "simulate --job toy --until 1 --out empty/x",
        "record run --out empty/x",
        "replay run --out empty/x",
        "compare --job toy --until 1 --exchange full --seeds 1 --out empty/x",
        "compare --job toy --until 1 --exchange full --seeds 1 --out run",
    ],
)
def test_what_cannot_be_written_is_said_before_the_run(
    said: Said, run: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, "run")
    monkeypatch.setattr("dlion.cli.simulate.play", None)
    monkeypatch.setattr("dlion.cli.replay.play", None)
    monkeypatch.setattr(engines, "on_processes", None)
    code, told = said(line)
    assert code == CANNOT_WRITE and f"where: {line.rpartition(' ')[2]}" in told and "what to do: " in told


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("--exchange ,", USAGE, ("--exchange: name one or more",)),
        ("--at 5ells", USAGE, ("--at", "'5ells'", "a duration like")),
        ("--until 5ells", CONFIGURATION, ('flag job.until: found "5ells"', "a duration like")),
        ("--job bytes", CONFIGURATION, ("bytes: not valid TOML: ", "text in UTF-8")),
        ("--out torn", BAD_DATA, ("a damaged results file", "where: torn/results.jsonl, line 1", "another --out")),
        ("--out taken", CANNOT_READ, ("where: taken/results.jsonl", "Is a directory", "check the path")),
        ("--on ray --workers 2", USAGE, ("--workers: a Ray cluster",)),
        ("--ray-address host:1", USAGE, ("--ray-address: it needs --on ray",)),
        ("--on ray", CONFIGURATION, ("ray is not installed", "pip install 'dlion[ray]'")),
    ],
)
def test_compare(said: Said, line: str, code: int, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("torn").mkdir()
    Path("torn/results.jsonl").write_text("{\n{}\n")
    Path("taken/results.jsonl").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    found, told = said(f"compare --job toy --until 1 --out out {line}")
    assert found == code and all(word in told for word in words), told
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("127.0.0.1:1", NO_PEER),
        ("ray://127.0.0.1:1", NO_PEER),
        ("nowhere", CONFIGURATION),
        ("http://h:1", CONFIGURATION),
    ],
)
def test_nobody_waits_for_a_cluster_that_is_not_there(address: str, code: int) -> None:
    with pytest.raises(Fault) as refused:
        engines.knock(address, f"--ray-address {address}")
    assert (
        refused.value.code == code and address in refused.value.where and "leave out --on ray" in refused.value.advice
    )


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR\r\n", b""])
def test_something_else_is_no_cluster(says: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.recv(1000)
                link.sendall(says)

        other = threading.Thread(target=serve)
        other.start()
        with pytest.raises(Fault, match="no Ray cluster answers; here; something else listens there"):
            engines.knock(f"127.0.0.1:{server.getsockname()[1]}", "here")
        other.join()
