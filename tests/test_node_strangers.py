"""What a node makes of a peer that is wrong, hostile, half dead or late: refused, named, counted, survived."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from node_runs import net, node, residual

from dlion import clock
from dlion.blocks import Encoding, dense, sparse
from dlion.exchange.full import Full
from dlion.exchange.pace import Free
from dlion.identity import UNDER_WAY
from dlion.messages import PROTOCOL_MAX, PROTOCOL_MIN, Hello, Message, PeerId, Span, Stream
from dlion.neighbours import DialSettings
from dlion.net.chunks import DATA, HEADER
from dlion.net.connection import Connection
from dlion.net.greeting import Greeting
from dlion.net.link import Link, LinkError
from dlion.net.pipe import pipe
from dlion.net.session import Session, SessionLimits
from dlion.node import Node, NodeSettings
from dlion.observe.runlog import Memory, RunLog
from dlion.once import Once
from dlion.porch import Unwanted
from dlion.simulation import MemoryNetwork, ModelledCompute
from dlion.wire.codec import decode, decode_hello, encode, encode_hello
from dlion.wire.limits import Limits

SIZE = 32
QUICK = DialSettings(quarantine_s=8.0)


@dataclass
class Victim:
    """A node ``a1`` whose only neighbour, ``b1``, is ours to play."""

    node: Node
    memory: Memory

    def events(self, kind: str) -> list[dict[str, Any]]:
        self.node.journal.flush()
        lines = (msgspec.json.decode(line) for line in self.memory.data.splitlines())
        return [line for line in lines if line["e"] == kind]

    @property
    def refusals(self) -> list[str]:
        return [f"{e['peer']}: {e['reason']}" for e in self.events("refuse")]


@asynccontextmanager
async def victim(**settings: Any) -> AsyncIterator[Victim]:
    """Training alone is not in it: it waits for b1 for an hour unless ``settings`` say otherwise."""
    topology, memory = net("a1 | b1"), Memory()
    dialer = MemoryNetwork(topology).dialer(PeerId("a1"))
    limits = NodeSettings(**{"start_wait_s": 3600.0, "drain_s": 2.0, "dial": QUICK, **settings})
    log = RunLog(memory)
    made = node(topology, "a1", dialer, ModelledCompute(), exchange=Full(), pace=Free(), log=log, settings=limits)
    async with made:
        yield Victim(made, memory)


@dataclass
class Stranger:
    """``b1``, made by hand: a link, a hello and a session, and nothing that keeps it honest."""

    link: Link
    hello: Hello
    """The victim's answer."""
    connection: Connection
    heard: list[Message] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def say(self, message: Message) -> None:
        self.connection.send(message.stream, encode(message))

    def told(self, kind: str) -> list[Message]:
        return [m for m in self.heard if m.kind == kind]


async def meet(
    node: Node, wrap: Callable[[Link], Link] = lambda link: link, before: Stranger | None = None, **changes: Any
) -> Stranger:
    """Dial ``node`` as b1, with ``changes`` to an honest hello; go on with the session of ``before``."""
    mine, theirs = pipe()
    node.accept(wrap(theirs))
    me = {"run": "test", "peer": "b1", "incarnation": 1, "role": "trainer", "job": "job", "model": "model"}
    cursors = {} if before is None else before.connection.session.cursors()
    versions = {"protocol_min": PROTOCOL_MIN, "protocol_max": PROTOCOL_MAX, "cursors": cursors, "of": 1}
    greeting = Greeting(mine)
    greeting.say(encode_hello(Hello(**{**me, **versions, **changes})))
    hello = decode_hello(await greeting.hear(5.0))
    if before is not None:
        if not hello.refusal:
            before.connection.attach(greeting, hello.cursors)
        return Stranger(mine, hello, before.connection, before.heard, before.lost)
    heard: list[Message] = []
    lost: list[str] = []
    connection = Connection(
        Session(SessionLimits(), asyncio.get_running_loop().time()),
        on_message=lambda stream, seq, body: heard.append(decode(bytes(body), Limits.of(SIZE))),
        on_writable=lambda: None,
        on_lost=lost.append,
    )
    if not hello.refusal:
        connection.attach(greeting, {})
    return Stranger(mine, hello, connection, heard, lost)


def update(step: int = 0, values: object = None, **changes: Any) -> Message:
    block = dense(np.full(SIZE, 0.5, np.float32) if values is None else np.asarray(values, np.float32))
    parts = {
        "fields": {"cloud": "b"},
        "blocks": (block,),
        "coverage": (Span(PeerId("b1"), step, step),),
        "origin": PeerId("b1"),
    }
    return Message("update", step, **{**parts, **changes})


def virtual(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    clock.run(test())


# -- greetings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"job": "another job"}, ["job mismatch", "'another job'", "'job'"]),
        ({"model": "another model"}, ["model mismatch", "'another model'", "'model'"]),
        ({"run": "another run"}, ["run mismatch", "'another run'", "'test'"]),
        ({"protocol_min": 7, "protocol_max": 9}, ["protocol mismatch", "7-9", f"{PROTOCOL_MIN}-{PROTOCOL_MAX}"]),
        ({"peer": "b7"}, ["unknown peer", "'b7'"]),
        ({"peer": "a1"}, ["unknown peer", "'a1'"]),
    ],
)
def test_a_mismatch_is_refused_on_both_sides_with_both_values(changes: dict[str, Any], values: list[str]) -> None:
    async def main() -> None:
        async with victim() as v:
            stranger = await meet(v.node, **changes)
            (refusal,) = v.refusals
            for value in values:
                assert value in stranger.hello.refusal and value in refusal
            assert refusal.startswith(f"{changes.get('peer', 'b1')}: " if changes.get("peer") != "b7" else "?: ")
            assert v.node.state == "joining"
            v.node.stop("test")

    virtual(main)


def test_what_a_stranger_says_is_not_taken_for_a_run_under_way() -> None:
    async def main() -> None:
        async with victim() as v:
            await meet(v.node, peer="b7", job=UNDER_WAY)
            assert not v.node.company.porch.under_way and v.node.state == "joining"
            v.node.stop("test")

    virtual(main)


def test_a_mismatched_node_is_refused_by_a_node() -> None:
    """Two real nodes, two jobs: each logs the other's value next to its own, and neither trains."""

    async def main() -> None:
        topology = net("a1 | b1")
        network, logs, nodes = MemoryNetwork(topology), {}, {}
        for peer in ("a1", "b1"):
            logs[peer] = Memory()
            nodes[peer] = node(
                topology,
                peer,
                network.dialer(PeerId(peer)),
                ModelledCompute(),
                exchange=Full(),
                log=RunLog(logs[peer]),
                settings=NodeSettings(start_wait_s=5.0),
                identity={"job": f"job of {peer}"},
            )
        with pytest.raises(ExceptionGroup) as group:
            async with asyncio.TaskGroup() as tasks:
                for peer, made in nodes.items():
                    tasks.create_task(_live(network, PeerId(peer), made))
        assert group.group_contains(Unwanted, match="no peer reachable")
        for peer in ("a1", "b1"):
            assert b"job mismatch" in logs[peer].data
            assert b"'job of a1'" in logs[peer].data and b"'job of b1'" in logs[peer].data

    virtual(main)


async def _live(network: MemoryNetwork, peer: PeerId, made: Node) -> None:
    async with made:
        network.doors[peer] = made.accept
        await made.wait()


@pytest.mark.parametrize("blob", [b"", b"\x80", b"x" * 20_000, b"\xff" * 64], ids=["empty", "map", "long", "noise"])
def test_a_hello_that_is_none_closes_that_link_and_nothing_else(blob: bytes) -> None:
    async def main() -> None:
        async with victim() as v:
            mine, theirs = pipe()
            v.node.accept(theirs)
            greeting = Greeting(mine)
            mine.write(len(blob).to_bytes(4, "little") + blob)
            with pytest.raises(Exception, match=r"aborted|closed|no greeting"):
                await greeting.hear(30.0)
            assert len(v.refusals) == 1 and v.refusals[0].startswith("?: incoming link")
            await meet(v.node)
            await asyncio.sleep(1.0)
            assert v.node.state == "training"
            v.node.stop("test")

    virtual(main)


def test_who_goes_before_its_hello_is_not_refused() -> None:
    async def main() -> None:
        async with victim() as v:
            mine, theirs = pipe()
            v.node.accept(theirs)
            Greeting(mine)
            mine.write(b"\x10\x00")
            mine.close()
            await asyncio.sleep(1.0)
            assert not v.refusals
            v.node.stop("test")

    virtual(main)


def test_cursors_that_lie_close_that_link_and_nothing_else() -> None:
    """The other end may not claim to have heard what was never said."""

    async def main() -> None:
        async with victim() as v:
            await meet(v.node, cursors={1: 1 << 40})
            await asyncio.sleep(0.1)
            assert any(r.startswith("b1: incoming link: cursor") for r in v.refusals)
            assert not v.node.neighbours.connected(PeerId("b1"))
            v.node.stop("test")

    virtual(main)


# -- messages ------------------------------------------------------------------------------------------------------

BAD = {
    "shape": update(blocks=(dense(np.zeros(SIZE + 1, np.float32)),)),
    "place": update(blocks=(dense(np.zeros(8, np.float32), start=SIZE - 4),)),
    "kind": Message("revolution", origin=PeerId("b1")),
    "node's kind": Message("~nonsense", origin=PeerId("b1")),
    "field": update(fields={"cloud": 7}),
    "missing field": update(fields={}),
    "stranger's name": update(origin=PeerId("mallory")),
    "stranger's coverage": update(coverage=(Span(PeerId("mallory"), 0, 0),)),
    "last word of nobody": Message("~done", fields={"peer": "mallory", "leaving": True}, origin=PeerId("b1")),
    "status": Message("~status", fields={"news": '[["b1",-1]]'}, origin=PeerId("b1"), stream=Stream.CONTROL),
    "huge": update(values=np.full(SIZE, 2e30)),
}


def bad_bytes() -> dict[str, bytes]:
    """Messages that honest code cannot make."""
    plain = encode(update())
    nan = plain[:-4] + np.array([np.nan], "<f4").tobytes()
    order = bytearray(encode(update(blocks=(sparse(np.ones(SIZE, np.float32), np.array([3, 9]), Encoding.F32),))))
    return {"NaN": nan, "truncated": plain[:-5], "longer": plain + b"\0" * 4, "noise": b"\x07" * 90, "short": order[:3]}


@pytest.mark.parametrize("what", [*BAD, "NaN", "truncated", "longer", "noise", "short"])
def test_an_inadmissible_message_is_refused_told_counted_and_survived(what: str) -> None:
    """It is acknowledged (so nobody sends it for ever), its sender is told, the next good one is applied."""

    async def main() -> None:
        async with victim() as v:
            stranger = await meet(v.node)
            await asyncio.sleep(0.5)
            before = v.node.ctx.weights.copy()
            body = encode(BAD[what]) if what in BAD else bytes(bad_bytes()[what])
            stream = BAD[what].stream if what in BAD else Stream.UPDATE
            stranger.connection.send(stream, body)
            await asyncio.sleep(0.5)
            (refusal,) = v.refusals
            assert refusal.startswith("b1: ")
            assert len(stranger.told("~refused")) == 1
            assert v.node.meter.refusals["b1"].total() == 1
            assert stranger.connection.session.idle and stranger.connection.connected
            moved = np.abs(v.node.ctx.weights - before).max()
            stranger.say(update(values=np.full(SIZE, 100.0)))
            await asyncio.sleep(0.1)
            assert np.isfinite(v.node.ctx.weights).all() and np.abs(v.node.ctx.weights - before).max() > 50 > moved
            v.node.stop("test")

    virtual(main)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x09" * 64,
        HEADER.pack(DATA, 1, 0, 1 << 31, 0) + b"\0" * 64,
        HEADER.pack(DATA, 1, 0, 100, 999) + b"\0" * 100,
        HEADER.pack(DATA, 200, 0, 8, 0) + b"\0" * 8,
        HEADER.pack(DATA, 1, 0, 8, 0) + b"\xff" * 8,
    ],
    ids=["noise", "oversized", "out of place", "no such stream", "a lying length"],
)
def test_malformed_framing_closes_the_link_with_a_reason_that_names_the_peer(frame: bytes) -> None:
    """And an honest connection afterwards is welcome: the session goes on."""

    async def main() -> None:
        async with victim() as v:
            stranger = await meet(v.node)
            await asyncio.sleep(0.5)
            stranger.link.write(frame)
            await asyncio.sleep(0.1)
            assert not v.node.neighbours.connected(PeerId("b1"))
            (lost,) = [e for e in v.events("member") if e["state"] == "link lost"]
            assert lost["peer"] == "b1" and lost["why"]
            assert stranger.lost and v.node.state == "training"
            again = await meet(v.node, before=stranger)
            assert not again.hello.refusal and v.node.neighbours.connected(PeerId("b1"))
            v.node.stop("test")

    virtual(main)


def test_repeats_quarantine_that_incarnation_for_a_while() -> None:
    async def main() -> None:
        async with victim(refusals_max=4) as v:
            stranger = await meet(v.node)
            for _ in range(4):
                stranger.say(BAD["shape"])
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)
            assert stranger.lost and len(stranger.told("~refused")) == 3
            assert any("quarantined: 4 inadmissible messages" in e["why"] for e in v.events("member"))
            turned_away = await meet(v.node, before=stranger)
            assert "quarantined" in turned_away.hello.refusal
            await asyncio.sleep(QUICK.quarantine_s)
            forgiven = await meet(v.node, before=stranger)
            assert not forgiven.hello.refusal and v.node.neighbours.connected(PeerId("b1"))
            v.node.stop("test")

    virtual(main)


class Cut:
    """A link that can go dead in both directions without a word, as when a host loses its power."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def attach(self, receiver: Any) -> None:
        outer, self.updated = self, receiver.buffer_updated
        self.sink = bytearray(1 << 16)

        class Half:
            link_writable, link_lost = receiver.link_writable, receiver.link_lost

            def get_buffer(self, hint: int) -> memoryview:
                return memoryview(outer.sink) if outer.dead else receiver.get_buffer(hint)

            def buffer_updated(self, nbytes: int) -> None:
                if not outer.dead:
                    receiver.buffer_updated(nbytes)

        self._link.attach(Half())  # type: ignore[arg-type]

    def write(self, data: Any) -> None:
        if not self.dead:
            self._link.write(data)


def test_a_half_open_connection_is_noticed_given_up_and_replaced() -> None:
    """Nothing comes for suspect_after_s: the peer is silent, the link is closed, a new one is taken."""

    async def main() -> None:
        async with victim(suspect_after_s=3.0) as v:
            links: list[Cut] = []

            def wrap(link: Link) -> Link:
                links.append(Cut(link))
                return links[-1]  # type: ignore[return-value]

            stranger = await meet(v.node, wrap)
            await asyncio.sleep(5.0)
            assert v.node.neighbours.connected(PeerId("b1")), "heartbeats keep a quiet link"
            links[0].dead = True
            await asyncio.sleep(4.5)
            assert not v.node.neighbours.connected(PeerId("b1"))
            states = [(e["state"], e["why"]) for e in v.events("member")]
            assert ("link lost", "nothing came for 3 s") in states and "silent" in dict(states)
            await meet(v.node, before=stranger)
            assert v.node.neighbours.connected(PeerId("b1"))
            assert [e["state"] for e in v.events("member")][-1] == "live"
            v.node.stop("test")

    virtual(main)


# -- the same update twice -----------------------------------------------------------------------------------------


def heard(hop: str, first: int, last: int | None = None, *, origin: str = "c1", count: int = 3) -> Message:
    block = sparse(np.ones(SIZE, np.float32), np.arange(count), Encoding.F32)
    span = Span(PeerId(origin), first, first if last is None else last)
    return Message("update", span.last, 0, {"cloud": "c"}, (block,), (span,), origin=PeerId(origin), hop=PeerId(hop))


def test_only_the_same_steps_over_another_route_are_a_duplicate() -> None:
    once = Once()
    assert not any(once.again(heard("a1", n)) for n in range(4))
    assert once.again(heard("b1", 3)) and once.again(heard("b1", 1, 2))
    assert not once.again(heard("a1", 3)), "the rest of a step, over its own route"
    assert not once.again(heard("b1", 3, 4)), "it also holds what is new"
    assert not once.again(heard("b1", 6)), "a route that is ahead ..."
    assert not once.again(heard("a1", 5)), "... does not make what comes late old"
    assert not once.again(heard("d1", 2, count=0)), "how far somebody is, without content"
    both = (Span(PeerId("c1"), 1, 1), Span(PeerId("c2"), 1, 1))
    message = heard("d1", 1)
    assert not once.again(Message("update", 1, blocks=message.blocks, coverage=both, hop=PeerId("d1")))


def test_two_bridges_that_both_believe_in_their_role_add_an_update_once() -> None:
    """c1's steps reach a1 through b1 and, while views differ, through b2: added once, logged as a duplicate."""

    async def main() -> None:
        topology, memory = net("a1 | b1 b2 | c1", "tree"), Memory()
        dialer = MemoryNetwork(topology).dialer(PeerId("a1"))
        settings = NodeSettings(start_wait_s=3600.0, drain_s=1.0)
        made = node(
            topology, "a1", dialer, ModelledCompute(), exchange=residual(), log=RunLog(memory), settings=settings
        )
        async with made:
            b1, b2, c1 = [await meet(made, peer=peer) for peer in ("b1", "b2", "c1")]
            del c1
            await asyncio.sleep(0.01)
            before = made.replica.applied.copy()
            for step in range(3):
                for hop in (b1, b2):
                    hop.say(heard("", step))
            await asyncio.sleep(0.01)
            assert before == {} and made.replica.applied == {"c1": 2}
            made.stop("test")
        applied = [msgspec.json.decode(line) for line in memory.data.splitlines() if b'"e":"apply"' in line]
        assert [(e["origin"], e["step"]) for e in applied] == [("c1", 0), ("c1", 1), ("c1", 2)]
        assert memory.data.count(b"duplicate: c1's steps") == 3

    virtual(main)


def test_a_link_that_came_as_the_node_closed_is_ended() -> None:
    """Its greeting was cancelled before it began; nobody else has the link."""

    async def main() -> None:
        async with victim() as v:
            mine, theirs = pipe()
            greeting = Greeting(mine)
            v.node.accept(theirs)
            v.node._close()
        with pytest.raises(LinkError, match="aborted"):
            await greeting.hear(5.0)

    virtual(main)
