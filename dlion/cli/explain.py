"""``dlion explain``: where a run's time went, what costs most, and what halving or doubling it would change.

Law: figures from ``observe.explanation``, what-ifs from replays; words and a table. A what-if is a replay against a
replay: the recorded run itself is only described.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import click
import msgspec
from rich.console import Console
from rich.table import Table

from dlion.cli import engines
from dlion.cli.build import Plan, exchange_of, pace_of
from dlion.cli.errors import TEMPORARY, Fault
from dlion.cli.planfile import encode_plan
from dlion.cli.replay import Recorded, load_recorded
from dlion.config import overruled
from dlion.config.job import BUDGET_BYTES_PER_S_MIN
from dlion.exchange.pace import Bounded
from dlion.mesh.changes import ChangeError, changed
from dlion.messages import PeerId
from dlion.observe.explanation import LinkUse, PeerTime, hindmost, link_uses, peer_times
from dlion.observe.live import percent, size
from dlion.observe.summary import mean_accuracy, time_to

LINKS_TRIED = 3
"""Pairs of micro-clouds whose links are halved and doubled."""
FACTORS = (0.5, 2.0)
EQUALLY_SLOW = 0.9
PACE_WAIT_MIN = 0.02
CHANGES_NOTHING = 0.02
"""A change of the outcome below this, or below what another seed changes, is none."""
SEEDS = 3
"""As many seeds tell what is chance."""


class WhatIf(TypedDict):
    """One thing changed, and the outcome of both replays (``Answer.measure``)."""

    what: str
    half: float | None
    double: float | None


class Answer(TypedDict):
    measure: str
    """``time to 0.90`` (seconds, less is better) or ``samples`` (more is better)."""
    as_it_is: float
    chance: float
    """Largest change, as a share, that another seed alone makes."""
    what_ifs: list[WhatIf]
    costs_most: str | None
    """The what-if whose doubling helps most; None: none helps."""


@dataclass(frozen=True)
class Suspect:
    """Something that may cost time, and the plans in which it is halved and doubled."""

    what: str
    plans: dict[float, Plan]


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--replay/--no-replay", default=True, show_default=True, help="Find out what changes would change.")
@click.option("--workers", type=click.IntRange(min=1), help="Replays at a time.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def command(directory: Path, replay: bool, workers: int | None, as_json: bool) -> None:
    """Say where the time of the run in DIR went: by peer, by link; and what halving or doubling would change."""
    found = load_recorded(directory)
    times, uses = peer_times(found.run), link_uses(found.run)
    answer = ask(found.plan, suspects(found, times, uses), workers or engines.cores()) if replay else None
    if as_json:
        links = {f"{a}>{b}": use for (a, b), use in uses.items()}
        whole = {"peers": times, "links": links, "what_if": answer, "notes": found.notes}
        click.echo(msgspec.json.encode(whole).decode())
        return
    for note in found.notes:
        click.echo(note, err=True)
    show(Console(highlight=False), found, times, uses, answer)


# -- what if ------------------------------------------------------------------------------------------------------


def suspects(found: Recorded, times: Mapping[str, PeerTime], uses: Mapping[tuple[str, str], LinkUse]) -> list[Suspect]:
    """The fullest links, the slowest machines, and the settings that hold steps back."""
    plan = found.plan
    tried = [key for key in _fullest(plan, uses) if _network(plan, key) is not None][:LINKS_TRIED]
    last = hindmost(dict(times))
    if last is not None:
        cloud = plan.topology.cloud_of(PeerId(last))
        members = [m for m in plan.topology.clouds[cloud] if m in times]
        alike = all(times[m]["samples_per_s"] * EQUALLY_SLOW <= times[last]["samples_per_s"] for m in members)
        tried.append(f"peer.{cloud if alike else last}.speed")
    made = [Suspect(key, plans) for key in tried if (plans := _network(plan, key)) is not None]
    targets, curve = plan.job.evaluate.targets, mean_accuracy(found.run)
    if targets and time_to(curve, min(targets)) is not None:  # larger batches mean more samples, not more learnt
        made.append(_setting(plan, "train.batch", plan.job.train.batch))
    for key in ("wan_bytes_per_s", "wan_bytes_per_day"):
        limit = getattr(plan.job.budget, key)
        if limit and plan.job.budget.bytes_per_s * min(FACTORS) >= BUDGET_BYTES_PER_S_MIN:
            made.append(_setting(plan, f"budget.{key}", limit))
    bounded = isinstance(pace_of(plan, exchange_of(plan)), Bounded) and plan.job.pace.staleness > 1
    if bounded and max((t["pace"] for t in times.values()), default=0.0) > PACE_WAIT_MIN:
        made.append(_setting(plan, "pace.staleness", plan.job.pace.staleness))
    return made


def _fullest(plan: Plan, uses: Mapping[tuple[str, str], LinkUse]) -> list[str]:
    """Keys of changes, the fullest links first: pairs of micro-clouds; where their links have no path of their own,
    what their busiest link crosses."""
    keys: dict[str, None] = {}
    for (source, target), use in uses.items():
        if not use["full"]:
            break
        a, b = (plan.topology.cloud_of(PeerId(end)) for end in (source, target))
        link = plan.topology.links[PeerId(source), PeerId(target)]
        pair = f"link.{min(a, b)}-{max(a, b)}.bandwidth" if a != b else f"link.{source}-{target}.bandwidth"
        narrow = min(link.resources, key=lambda name: plan.topology.resources[name].rate.at(0.0), default=None)
        own = narrow is None or plan.topology.resources[narrow].kind == "path"
        keys[pair if own else f"resource.{narrow}.bandwidth"] = None
    return list(keys)


def _network(plan: Plan, key: str) -> dict[float, Plan] | None:
    """The plan with ``key`` halved and doubled; None where that cannot be done."""
    try:
        return {factor: replace(plan, topology=changed(plan.topology, {key: factor})) for factor in FACTORS}
    except ChangeError:
        return None


def _setting(plan: Plan, key: str, value: int) -> Suspect:
    plans = {f: replace(plan, job=overruled(plan.job, {key: max(1, round(value * f))})) for f in FACTORS}
    return Suspect(f"{key} = {value}", plans)


def ask(plan: Plan, tried: list[Suspect], workers: int) -> Answer:
    """Replay as it is, and with each suspect halved and doubled. Raises Fault when the plan itself cannot be played."""
    seeds = {
        f"seed {n}": replace(plan, job=overruled(plan.job, {"job.seed": plan.job.job.seed + n})) for n in range(SEEDS)
    }
    plans = seeds | {f"{i}:{f}": p for i, one in enumerate(tried) for f, p in one.plans.items()}
    results: dict[str, Any] = {}
    for key, result in engines.on_processes({k: encode_plan(p) for k, p in plans.items()}, workers):
        click.echo(f"replays: {len(results) + 1}/{len(plans)}", err=True)
        results[key] = result if isinstance(result, engines.Failure) else msgspec.json.decode(result)["summary"]
    base = results["seed 0"]
    if isinstance(base, engines.Failure):
        raise Fault(TEMPORARY, "the run cannot be played again", why=base.why, advice="--no-replay describes it only")
    reached = {target: seconds for target, seconds in base["time_to"].items() if seconds is not None}
    target = max(reached, default=None)

    def outcome(summary: Any) -> float | None:
        if isinstance(summary, engines.Failure):
            return None
        return summary["time_to"][target] if target is not None else float(summary["samples"])

    what_ifs: list[WhatIf] = [
        {"what": one.what, "half": outcome(results[f"{i}:0.5"]), "double": outcome(results[f"{i}:2.0"])}
        for i, one in enumerate(tried)
    ]
    now = outcome(base) or 0.0
    others = [value for key in seeds if (value := outcome(results[key])) is not None]
    answer: Answer = {
        "measure": f"time to {target}" if target is not None else "samples",
        "as_it_is": now,
        "chance": max((abs(value / now - 1) for value in others), default=0.0) if now else 0.0,
        "what_ifs": what_ifs,
        "costs_most": None,
    }
    gains = {one["what"]: _gain(answer, one["double"]) for one in what_ifs}
    best = max(gains, key=lambda what: gains[what], default=None)
    if best is not None and gains[best] > max(CHANGES_NOTHING, answer["chance"]):
        answer["costs_most"] = best
    return answer


def _gain(answer: Answer, outcome: float | None) -> float:
    """How much better than as it is, as a share."""
    if outcome is None or not answer["as_it_is"]:
        return 0.0
    change = outcome / answer["as_it_is"] - 1
    return change if answer["measure"] == "samples" else -change


# -- in words -----------------------------------------------------------------------------------------------------


def show(
    console: Console,
    found: Recorded,
    times: Mapping[str, PeerTime],
    uses: Mapping[tuple[str, str], LinkUse],
    answer: Answer | None,
) -> None:
    head = found.run.header
    console.print(
        f"[bold]{head.exchange}[/] on {head.job}, {head.topology}, seed {head.seed}: {found.run.seconds:.1f} s"
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("peer", "steps", "a step", "computes", "waits: pace", "strategy", "room", "between steps"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    for peer, t in times.items():
        shares = (percent(t[key]) for key in ("compute", "pace", "strategy", "room", "between"))
        table.add_row(peer, str(t["steps"]), f"{t['step_s']:.3g} s", *shares)
    console.print(table)
    for sentence in sentences(times, uses):
        console.print(sentence)
    if answer is not None:
        show_answer(console, answer)


WORDS: Mapping[str, str] = {
    "pace": "because others are too far behind",
    "strategy": "for its strategy's round to end",
    "room": "for room on its links",
}


def sentences(times: Mapping[str, PeerTime], uses: Mapping[tuple[str, str], LinkUse]) -> list[str]:
    """What the tables say, in words."""
    waits = [(t["pace"], peer, "pace") for peer, t in times.items()]
    waits += [(t["strategy"], peer, "strategy") for peer, t in times.items()]
    waits += [(t["room"], peer, "room") for peer, t in times.items()]
    share, waiting, why = max(waits, default=(0.0, "", ""))
    last = hindmost(dict(times))
    said = []
    if share >= CHANGES_NOTHING:
        said.append(f"{waiting} waits longest: {percent(share)} of its time {WORDS[why]}.")
    else:
        said.append("Nobody waits: the machines set the speed.")
    if last is not None:
        t = times[last]
        pace = f"{t['step_s']:.3g} s a step, {t['samples_per_s']:.4g} samples/s"
        said.append(f"{last} waits least: it computes {percent(t['compute'])} of its time, {pace}.")
    for (a, b), use in [*uses.items()][:1]:
        rate = f" at {use['rate_bps'] / 1e6:.4g} Mbit/s" if use["rate_bps"] else ""
        carried = f"{size(use['bytes'])} sent, {percent(use['full'])} of the time full{rate}"
        said.append(f"The fullest link is {a}>{b}: {carried}.")
    return said


def show_answer(console: Console, answer: Answer) -> None:
    """The what-ifs as a table, and which of them costs most."""
    seconds = answer["measure"] != "samples"

    def outcome(value: float | None) -> str:
        if value is None:
            return "not reached"
        shown = f"{value:.1f} s" if seconds else f"{value:.0f}"
        change = value / answer["as_it_is"] - 1 if answer["as_it_is"] else 0.0
        if abs(change) < CHANGES_NOTHING:
            return f"{shown} (no change)"
        return f"{shown} ({change:+.0%}{', may be chance' if abs(change) <= answer['chance'] else ''})"

    now = f"{answer['as_it_is']:.1f} s" if seconds else f"{answer['as_it_is']:.0f}"
    chance = f" (another seed: up to {answer['chance']:.0%} off)" if answer["chance"] >= 0.005 else ""
    console.print(f"\nReplayed, {answer['measure']}: {now}{chance}. It would be:")
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("", "halved", "doubled"):
        table.add_column(column, justify="right" if column else "left")
    for one in answer["what_ifs"]:
        table.add_row(one["what"], outcome(one["half"]), outcome(one["double"]))
    console.print(table)
    most = answer["costs_most"]
    beyond = f" by more than chance ({answer['chance']:.0%})" if answer["chance"] >= CHANGES_NOTHING else ""
    console.print(f"What costs most: [bold]{most}[/]." if most else f"Doubling none of these would help{beyond}.")
