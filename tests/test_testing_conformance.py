"""The conformance kit says what is wrong with a strategy that breaks a rule: which rule, and in which hook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from node_runs import net, run

from dlion.exchange.base import Action, Add, Context, Exchange, Send, Update
from dlion.exchange.gaia import Gaia
from dlion.messages import Message, Span
from dlion.testing import Nonconforming, check


class Mute(Exchange):
    """Forgot to yield what it would say."""

    name = "mute"
    speaks = {"top": {}}  # noqa: RUF012

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        yield Add(update.values, coverage=(Span(ctx.me, update.step, update.step),))


class Returns(Mute):
    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        return Add(update.values)  # type: ignore[return-value]


class Nothing(Mute):
    def on_members(self, ctx: Context) -> Iterable[Action]:
        return None  # type: ignore[return-value]


class Later(Mute):
    async def after_step(self, update: Update, ctx: Context) -> Any:  # type: ignore[override]
        yield Add(update.values)


class Odd(Mute):
    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        yield "hello"  # type: ignore[misc]


class Endless(Mute):
    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        while True:
            yield Add(np.zeros_like(update.values))


class Undeclared(Mute):
    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        yield Send(tuple(ctx.links), Message("tip", update.step))


class Counts(Mute):
    """Says every fifth update, and forgets how many there were."""

    def setup(self, ctx: Context) -> None:
        self.count = 0

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        yield from super().after_step(update, ctx)
        self.count += 1
        links = tuple(peer for peer, link in ctx.links.items() if link.writable_bytes > 0)
        if self.count % 5 == 0 and links:
            yield Send(links, Message("top", update.step))


class Forgetful(Gaia):
    """What it owes is not in its state."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None: ...


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (Mute, "speaks: nobody says anything in 240 steps"),
        (Returns, "trains: after_step returns Add; expected actions"),
        (Nothing, "on_members returns NoneType; expected actions: yield them"),
        (Later, "after_step returns async_generator"),
        (Odd, "after_step yields 'hello', which is none of Send, Add, Timer"),
        (Endless, "after_step yields 10000 actions and still goes on"),
        (Counts, "restores: after a restart in between it goes on otherwise: `state` lacks something"),
        (Undeclared, "kind 'tip' is not understood .`speaks` names kinds and fields"),
        (
            Forgetful,
            "restores: promises consensus, but replicas differ by .* after a restart .* `state` lacks something",
        ),
    ],
)
def test_the_verdict_names_the_rule_and_the_hook(strategy: type[Exchange], says: str) -> None:
    with pytest.raises(Nonconforming, match=says):
        check(strategy)


def test_a_run_refuses_what_is_no_action_too() -> None:
    with pytest.raises(TypeError, match="mute: a hook yields 'hello', none of Send, Add, Timer"):
        run(net("a1 | b1"), exchange=Odd, until_s=1.0)
