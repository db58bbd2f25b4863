"""Peers started again each by itself go on from the newest checkpoint that all of them have, or say why they cannot."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import aiohttp
import pytest
from node_runs import net
from test_checkpoint_live import plan

from dlion.checkpoint import CheckpointStore
from dlion.cli.agree import Agreement, agreed
from dlion.cli.build import Plan
from dlion.cli.errors import Fault
from dlion.cli.host import Doors, hosted
from dlion.cli.keep import FOLDER, Start, cuts_of
from dlion.config import load_job
from dlion.cut import name_of, number_of
from dlion.messages import PeerId
from dlion.net.upgrade import BESIDE, peer_application, serve

CHAIN = {"a1": ("a2",), "a2": (), "b1": ("a2", "b2"), "b2": ()}
"""Who dials whom: a1 and b2 have no link, and a2 can dial nobody."""


def agree(cuts: dict[str, list[int]], absent: str = "") -> dict[str, Start | Fault]:
    """Real doors on loopback, started one after the other; what each peer decides."""

    async def main() -> dict[str, Start | Fault]:
        agreements = {p: Agreement(plan(), PeerId(p), held) for p, held in cuts.items()}
        sites = {}
        for peer, agreement in agreements.items():
            if peer != absent:
                sites[peer] = await serve(peer_application(lambda link: None, answer=agreement.answer), "127.0.0.1", 0)
        where = {p: f"127.0.0.1:{site.port}" for p, site in sites.items()} | ({absent: "127.0.0.1:1"} if absent else {})

        async def decides(peer: str) -> Start | Fault:
            known = [where[other] if other in CHAIN[peer] else "" for other in cuts]
            wait_s = 0.5 if absent else 20.0
            try:
                return await agreed(agreements[peer], known, Start(), has=bool(cuts[peer]), wait_s=wait_s)
            except Fault as fault:
                return fault

        try:
            present = [peer for peer in cuts if peer != absent]
            return dict(zip(present, await asyncio.gather(*map(decides, present)), strict=True))
        finally:
            for site in sites.values():
                await site.close()

    return asyncio.run(main())


def test_all_choose_the_newest_that_all_have_whoever_can_dial_whom() -> None:
    found = agree({"a1": [1, 2, 3], "a2": [2, 3, 4], "b1": [1, 2, 3], "b2": [1, 2]})
    assert found == dict.fromkeys(CHAIN, Start("0.2"))


def test_one_that_has_none_is_named_by_the_others_and_begins_afresh() -> None:
    found = agree({"a1": [1], "a2": [1, 2], "b1": [1], "b2": []})
    assert found.pop("b2") == Start()
    for fault in found.values():
        assert isinstance(fault, Fault) and fault.code == 78
        assert "a2 has 0.2, 0.1" in fault.why and "b2 has none" in fault.why and "--fresh" in fault.advice


def test_who_does_not_come_in_time_is_not_waited_for() -> None:
    assert agree({"a1": [1, 2], "a2": [1, 2, 3], "b1": [1, 2], "b2": [1]}, absent="b2") == dict.fromkeys(
        ("a1", "a2", "b1"), Start("0.2")
    )


def test_a_word_of_another_run_or_of_nobody_counts_nothing() -> None:
    mine, other = Agreement(plan(), PeerId("a1"), [1]), Agreement(plan(**{"train.batch": 7}), PeerId("a2"), [])
    mine.hear(other.told())
    stranger = json.loads(Agreement(plan(), PeerId("a2"), [1]).told())
    mine.hear(json.dumps({**stranger, "cuts": {"zz": [9], "a1": []}}).encode())
    assert mine.start() == Start("0.1") and not mine.complete
    for nonsense in (b"", b"[]", b"{", json.dumps({**stranger, "cuts": {"a2": [-1]}}).encode()):
        with pytest.raises(ValueError):
            mine.hear(nonsense)


def test_the_door_answers_nonsense_with_400_and_goes_on() -> None:
    async def main() -> list[int]:
        door = peer_application(lambda link: None, answer=Agreement(plan(), PeerId("a1"), [1]).answer)
        site = await serve(door, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{site.port}{BESIDE}"
        said = [b"\xff" * 99, b"[" * 100_000, Agreement(plan(), PeerId("a2"), [1]).told()]
        async with aiohttp.ClientSession() as client:
            codes = [(await client.post(url, data=body)).status for body in said]
        await site.close()
        return codes

    assert asyncio.run(main()) == [400, 400, 200]


def test_nodes_hosted_anew_go_on_from_the_newest_that_both_have(tmp_path: Path) -> None:
    """Three lives, each in directories of their own; before the third, one peer loses its newest checkpoint."""

    def live(until_s: float) -> list[tuple[str, float]]:
        job = load_job("toy", {"job.until": until_s, "exchange.name": "full"})
        two = Plan(job, net("a1 | b1"), "test")

        async def main() -> list[tuple[str, float]]:
            here: dict[str, asyncio.Future[str]] = {p: asyncio.get_running_loop().create_future() for p in two.peers}

            async def one(peer: PeerId, other: PeerId) -> tuple[str, float]:
                async def introduce(address: str) -> dict[str, str]:
                    here[peer].set_result(address)
                    return {other: await here[other]}

                async with hosted(two, peer, Doors(("127.0.0.1", 0), None), tmp_path / peer, introduce) as host:
                    await host.node.wait()
                    part = host.keeping.part
                    return ("", 0.0) if part is None else (name_of(part.number), part.t)

            a1, b1 = two.peers
            return list(await asyncio.gather(one(a1, b1), one(b1, a1)))

        return asyncio.run(main())

    assert [name for name, _ in live(0.3)] == ["", ""]
    assert [name for name, _ in live(0.6)] == ["0.end", "0.end"]
    store = CheckpointStore(tmp_path / "b1" / FOLDER / "b1")
    shutil.rmtree(cuts_of(store)[number_of("1.end")])
    assert [name for name, _ in live(0.9)] == ["0.end", "0.end"]
    assert [name for name, _ in live(1.2)] == ["1.end", "1.end"]
