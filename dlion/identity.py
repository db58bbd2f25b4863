"""Who a peer says it is, and why two that greet each other are not of the same run.

Law: pure; knows hellos and nothing of links.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlion.messages import PROTOCOL_MAX, PROTOCOL_MIN, Hello, PeerId

CUT = "cut:"
TRAINING = "training:"
"""Capability of those who do not wait for us: which life of ours they know."""
JOINING = "joining"
LATE = "late"
UNDER_WAY = "is training already"
"""In the refusal of those who cannot be waited for, but asked to be a sponsor."""
NAME_SHOWN = 64
"""Characters of a stranger's words that are repeated."""


@dataclass(frozen=True)
class Identity:
    """Who this peer is in this life. ``incarnation`` grows with every start of the same peer."""

    run: str
    peer: PeerId
    incarnation: int
    job: str
    """Hash of the job: peers with another one are refused."""
    model: str
    """Layout digest."""
    role: str = "trainer"
    cut: str = ""
    """The checkpoint that this peer goes on from; peers that go on from another one are refused."""

    joining: bool = False
    """It wants to come into a run under way, and asks whom it greets to be its sponsor."""
    late: bool = False
    """It came into the run, which those beyond bridges hear as news."""

    @property
    def capabilities(self) -> list[str]:
        return [CUT + self.cut] * bool(self.cut) + [JOINING] * self.joining + [LATE] * self.late


def cut_of(hello: Hello) -> str:
    """The checkpoint that its sender goes on from."""
    return next((c.removeprefix(CUT)[:NAME_SHOWN] for c in hello.capabilities if c.startswith(CUT)), "")


def mismatch(me: Identity, hello: Hello) -> str:
    """Why its sender cannot be of our run at all (empty: it can)."""
    peer = hello.peer
    if hello.protocol_max < PROTOCOL_MIN or hello.protocol_min > PROTOCOL_MAX:
        theirs, ours = f"{hello.protocol_min}-{hello.protocol_max}", f"{PROTOCOL_MIN}-{PROTOCOL_MAX}"
        return f"protocol mismatch: {peer[:NAME_SHOWN]} speaks {theirs}, {me.peer} speaks {ours}"
    for what in ("run", "job", "model"):
        theirs, ours = getattr(hello, what), getattr(me, what)
        if theirs != ours:
            return f"{what} mismatch: {peer[:NAME_SHOWN]} has {theirs[:NAME_SHOWN]!r}, {me.peer} has {ours!r}"
    return ""


def other_cut(me: Identity, hello: Hello) -> str:
    """Why it did not begin where we did (empty: it did)."""
    peer = hello.peer
    if me.joining or JOINING in hello.capabilities:
        return ""  # whatever it went on from, it gets what its sponsor has
    theirs = cut_of(hello)
    if theirs != me.cut:
        start = "starts afresh"
        return (
            f"checkpoint mismatch: {peer[:NAME_SHOWN]} {f'goes on from cut {theirs!r}' if theirs else start}, "
            f"{me.peer} {f'goes on from cut {me.cut!r}' if me.cut else start}: start all of them with the same "
            "--cut, or with --fresh"
        )
    return ""
