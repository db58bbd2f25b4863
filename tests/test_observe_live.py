"""The live view and the admin application, from made-up statuses."""

from __future__ import annotations

import io
import json
import re

import pytest
from aiohttp import ClientSession, web
from prometheus_check import parse_exposition
from rich.console import Console

from dlion.observe.admin import admin_application, readiness, served
from dlion.observe.live import LiveView, bar, link_cell, links, progress_line, size, table
from dlion.observe.metrics import exposition
from dlion.observe.status import LinkStatus, PeerStatus


def link(used_bps: float = 12.3e6, available_bps: float | None = 20e6, up: bool = True) -> LinkStatus:
    return {
        "up": up,
        "rate_bps": 19e6,
        "used_bps": used_bps,
        "available_bps": available_bps,
        "rtt_s": 0.06,
        "sent_bytes": 1_550_000,
        "received_bytes": 4,
        "share_sent": 0.09,
    }


def status(peer: str = "a1", step: int = 120, to: str = "b1") -> PeerStatus:
    return {
        "peer": peer,
        "cloud": peer[0],
        "state": "training",
        "step": step,
        "loss": 0.4312,
        "accuracy": None,
        "batch": 64,
        "samples_per_s": 406.0,
        "stall_share": 0.004,
        "staleness_max": 2,
        "links": {to: link()},
        "members": {"live": 2, "total": 2},
    }


def test_the_piped_line_is_the_agreed_one() -> None:
    assert progress_line([status(), status("b1", 130, "a1")]) == (
        "step: 120  loss: 0.4312  samples/s: 812  sent: 3.1MB  peers: 2/2  stale_max: 2  stall: 0.4%"
    )


def test_a_dead_peer_is_missed_and_nothing_at_all_can_be_shown() -> None:
    alone, gone = status(), status("b1")
    gone["state"] = "stopped"
    assert "peers: 1/2" in progress_line([alone, gone])
    alone["members"] = {"live": 1, "total": 2}
    assert "peers: 1/2" in progress_line([alone])
    assert progress_line([]).startswith("step: 0  loss: -  ")
    ended: PeerStatus = {**status(step=200), "state": "stopped"}
    killed: PeerStatus = {**status("b1", 30), "state": "stopped"}
    assert progress_line([ended, killed]).startswith("step: 200  ")
    assert "peers: 2/2" in progress_line([ended]), "one alone says who lived when it stopped"


def test_a_pipe_gets_one_plain_line_per_interval_and_a_terminal_a_table() -> None:
    pipe = Console(file=io.StringIO(), width=20)
    with LiveView(pipe) as view:
        view.show([status()])
        view.show([status(step=121)])
    lines = pipe.file.getvalue().splitlines()
    assert [re.match(r"step: (\d+)  loss", text)[1] for text in lines] == ["120", "121"]
    terminal = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with LiveView(terminal) as view:
        view.show([status()])
    shown = terminal.file.getvalue()
    assert "→ b1" in shown and "12.3/20" in shown and "9.0%" in shown


def test_the_table_of_sixteen_peers_fits_peers_without_links_and_links_that_are_down() -> None:
    statuses = [status(f"{c}{i}") for c in "abcd" for i in range(4)]
    statuses[0]["links"] = {}
    statuses[1]["links"] = {"b1": link(up=False)}
    console = Console(file=io.StringIO(), width=160)
    console.print(table(statuses))
    assert "down" in console.file.getvalue()


@pytest.mark.parametrize(
    ("width", "shown", "hidden"), [(140, "12.3/20 ███", ""), (100, "12.3/20 9.0%", "███"), (60, "62%", "12.3")]
)
def test_no_column_is_cut_on_a_narrow_terminal(width: int, shown: str, hidden: str) -> None:
    names = ["a1", "a2", "b1", "b2", "c1", "c2"]
    statuses = [status(name) | {"links": {n: link() for n in names}} for name in names]
    console = Console(file=io.StringIO(), width=width)
    console.print(links(statuses, width))
    text = console.file.getvalue()
    assert text.count(shown) == 36 and "…" not in text
    assert not hidden or hidden not in text


@pytest.mark.parametrize(("share", "drawn"), [(0.0, "     "), (0.5, "██▌  "), (1.0, "█████"), (0.999, "█████")])
def test_bars_always_have_the_same_width(share: float, drawn: str) -> None:
    assert bar(share) == drawn


def test_a_link_without_stated_rate_is_measured_against_its_own_estimate() -> None:
    assert link_cell(link(available_bps=None)).plain.startswith("12.3/19 ")
    assert link_cell(link(available_bps=0.0) | {"rate_bps": 0.0}).plain.startswith("12.3/0")


def test_sizes_read_like_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 3_100_000, 2e9, 5e15)] == [
        "0B",
        "999B",
        "1.0kB",
        "3.1MB",
        "2.0GB",
        "5000.0TB",
    ]


def test_metrics_are_wellformed_and_lose_no_digit() -> None:
    held = status(to='odd"name\n')
    held["links"]['odd"name\n']["sent_bytes"] = 12_345_678_901_234_567
    held["refused"] = {"b1": {"non-finite": 3}}
    found = parse_exposition(exposition(held))
    assert found['dlion_sent_bytes_total{peer="odd\\"name\\n",kind="all"}'] == "12345678901234567"
    assert found['dlion_updates_rejected_total{peer="b1",reason="non-finite"}'] == "3"
    assert found['dlion_link_rate_bytes_per_second{peer="odd\\"name\\n"}'] == "2375000"
    assert found["dlion_loss"] == "0.4312"
    assert "dlion_accuracy" not in found


@pytest.mark.asyncio
async def test_admin_answers_alone_and_mounted() -> None:
    held = status()
    outer = web.Application()
    outer.add_subapp("/dlion/", admin_application(lambda: held))
    async with (
        served(admin_application(lambda: held)) as (host, port),
        served(outer) as (_, outer_port),
        ClientSession() as client,
    ):
        assert host == "127.0.0.1"
        for base in (f"http://{host}:{port}", f"http://{host}:{outer_port}/dlion"):
            async with client.get(f"{base}/livez") as answer:
                assert answer.status == 200
            async with client.get(f"{base}/status.json") as answer:
                assert await answer.json() == json.loads(json.dumps(held))
            async with client.get(f"{base}/metrics") as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert parse_exposition(await answer.text())["dlion_step"] == "120"
        ready = f"http://{host}:{port}/readyz"
        async with client.get(ready) as answer:
            assert (answer.status, await answer.json()) == (200, {"ready": True, "reasons": []})
        held["reasons"] = ["no neighbour reachable"]
        async with client.get(ready) as answer:
            assert (answer.status, (await answer.json())["reasons"]) == (503, ["no neighbour reachable"])


def test_a_peer_that_still_joins_is_not_ready() -> None:
    held = status()
    held["state"] = "joining"
    assert readiness(held) == (False, ["state is joining"])
    troubled: PeerStatus = {**status(), "ready": True, "reasons": ["the disk is full"]}
    assert readiness(troubled) == (True, ["the disk is full"]), "it trains: no reason to take it out of service"
