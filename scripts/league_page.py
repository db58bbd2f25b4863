"""The league's page: docs/league.md and its pictures, from the rows alone.

Law: rows in, files out; no simulation. Every figure is computed here, none is typed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from league_claims import claims
from league_stats import (
    ORACLE,
    OURS,
    Rows,
    beside,
    by_strategy,
    bytes_to,
    half_width,
    interval,
    main_target,
    median,
    ratios,
    reached,
    smooth,
    targets_of,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlion.observe.report import style

TIE = 0.15
"""Of one seed or two, times that differ by less than this share are a tie: other seeds move them by as much."""
DRAWN_MAX = 7
NEAR = 1.25
"""Who takes no more than so many times as long is asked how many bytes it took."""

INTRO = """# The league

Every strategy of the family on the same links, data and gradients, in virtual time (`dlion simulate`): real nodes,
sessions and codecs, modelled durations. Written by `scripts/league.py page` from `docs/league/results.jsonl`; edit
neither by hand.

- **Task**: Fashion-MNIST, an MLP 784-512-256-10 ({parameters:,} parameters, 2.1 MB in float32), 64 samples per step
  and peer at the start, dealt by compute power from then on; the global batch does not grow
  (`batching.growth = false`); SGD with momentum 0.9. Accuracy on 2,000 fixed test images every 5 virtual seconds, on
  all 10,000 at the end, always of the deployable view (what a peer would save and serve). Where a scenario sets another
  task, its title says so.
- **oracle** is the limit: `full` in lockstep with batches dealt by compute power as for all, links without limit or
  delay, an exchange lane without cost. Strategies that step on local updates meanwhile may pass it.
- **Learning rate**: one of {rates} for each strategy, chosen on `hetero-system` and `homogeneous` in 40 virtual
  seconds by the best mean accuracy over the second half: 0.02, 0.05 and 0.1 with seed {seeds[0]}, and on from the best
  while that is the least or the greatest, twice at most; then the best two with seed {seeds[1]} too. The same budget
  for all (two rungs, not a halving of horizons). All else: defaults. `foresight` and `slices`, and nothing of the
  others, were chosen with seeds 0 to 2 of `homogeneous` and `hetero-system` (iid and Dirichlet) in sight, bridges in
  place of a mesh with seeds 0 to 2 of `hetero-system` and one of `writers` and two under Dirichlet; all other scenarios
  were not looked at for any choice.
- **Slices**: `pride` takes a step's gradient in four, `pride-whole` as a whole, as all others do. Here a sample costs
  the same in a slice as in a batch. For a convolutional net on one core that is so (64 samples: times 0.99,
  `scripts/bench_slices.py`), for a net as small as this one it is not (times 2.2), and a peer that measures so takes
  fewer: then `pride-whole` is what to expect.
- **-fixed**: as its paper ran it, with 64 samples a step everywhere. The rows without it are lent DLion's batches dealt
  by compute power.
- **Times** are crossings of the mean accuracy of the peers, smoothed over three points, interpolated. "–": not within
  the horizon; who never arrives counts as "at least horizon / our time".
- **Noise**: one seed is a hint, not a proof (see the column): closer than 15 % is a tie. Of three seeds and more, a
  95 % interval that holds 1 (Student's t on the logarithms of ratios on the same seed) is a tie; the ratio before it is
  the median. Seeds differ in initial weights, order of data and division among the peers.
- **mean of replicas**: of all peers' training replicas, after the drain, on all 10,000 ("–": an older row).
- **replica**: by how many points the training replica of the first peer is better than its deployable view, in the
  second half of the horizon; "–": they are one.
- **Not run**: what has no row below; momentum other than 0.9 (which suits those that hear each other early) but for
  one ablation; H of DiLoCo and its kin other than their default for short jobs.

Commands (a run that has its row is skipped):

    python scripts/league.py tune --data ../shared/data/training
    python scripts/league.py run --data ../shared/data/training [--until S] [--seeds 0,1] [--strategies A,B] SCENARIO...
    python scripts/league.py run --data ../shared/data/training --ablations [...] SCENARIO...
    python scripts/league.py one --data ../shared/data/training 'SPEC'      # any one run; specs are at the end
    python scripts/league.py page
"""


def shown(value: float | None, form: str = "{:.1f}") -> str:
    return "–" if value is None else form.format(value)


def table(groups: Mapping[str, Rows]) -> str:
    targets, main = targets_of(groups), main_target(groups)

    def order(name: str) -> tuple[float, float]:
        at = reached(groups[name], main)
        return (np.inf if at is None else at, -np.mean([row["mean"][-1] for row in groups[name]]))

    head = ["strategy", "lr", "seeds", *(f"{100 * t:.3g} % at, s" for t in targets), "at the end", "all 10,000: mean"]
    head += ["worst peer", "mean of replicas", "replica", f"WAN MB to {100 * main:.3g} %", "WAN MB", "stalled"]
    head.append("disagreement")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in sorted(groups, key=order):
        rows = groups[name]
        wan = median([bytes_to(row, main) for row in rows])
        cells = [f"**{name}**" if name == OURS else name, f"{rows[0]['spec']['rate']:g}", str(len(rows))]
        cells += [shown(reached(rows, t)) for t in targets]
        cells += [f"{100 * np.mean([row[key] for row in rows]):.1f}" for key in ("full_mean", "full_worst")]
        centre = [row["full_of_mean"] for row in rows if "full_of_mean" in row]
        cells.append(shown(100 * float(np.mean(centre)) if centre else None))
        cells.append(shown(beside(rows), "{:+.1f}"))
        cells.insert(-4, f"{100 * np.mean([row['mean'][-1] for row in rows]):.1f}")
        cells.append("0" if name == ORACLE else shown(None if wan is None else wan / 1e6, "{:.0f}"))
        cells.append("0" if name == ORACLE else f"{np.mean([row['wan_bytes'][-1] for row in rows]) / 1e6:.0f}")
        cells.append(f"{100 * max(row['stalled'] for row in rows):.1f} %")
        cells.append(shown(max(row["disagreement"] or 0.0 for row in rows), "{:.0e}"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablations(groups: Mapping[str, Rows], whole: Rows, target: float) -> str:
    """Ours with one thing changed, beside ours: later or sooner at the target, and points at the end, same seeds."""
    head = [
        "changed",
        "seeds",
        f"time to {100 * target:.3g} %, of ours",
        "points at the end",
        "WAN MB, of ours",
        "stalled",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    mine = {row["spec"]["seed"]: row for row in whole}
    for name, rows in groups.items():
        pairs = [(row, mine[row["spec"]["seed"]]) for row in rows if row["spec"]["seed"] in mine]
        if not pairs:
            continue
        times, arrived = ratios(whole, rows, target)
        points = [100 * (row["full_mean"] - own["full_mean"]) for row, own in pairs]
        wan = float(np.mean([row["wan_bytes"][-1] / own["wan_bytes"][-1] for row, own in pairs]))
        spread = f" ({min(times):.2f} to {max(times):.2f})" if len(times) > 1 else ""
        time = f"{'' if arrived else '≥ '}{float(np.median(times)):.2f}x{spread}" if times else "–"
        stalled = 100 * max(row["stalled"] for row in rows)
        what = name.partition(", ")[2]
        lines.append(f"| {what} | {len(pairs)} | {time} | {np.mean(points):+.1f} | {wan:.2f}x | {stalled:.1f} % |")
    return "\n".join(lines)


def verdict(groups: Mapping[str, Rows]) -> str:
    """Ours against each other strategy at the oracle's target: wins, ties, losses, on the seeds that both ran."""
    if groups.keys() <= {OURS} or OURS not in groups:
        return ""
    main = main_target(groups)
    sides: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": []}
    for name, rows in groups.items():
        found, arrived = ratios(groups[OURS], rows, main)
        if name == OURS or not found:
            continue
        middle, sure = float(np.median(found)), interval(found)
        low, high = sure or (min(found), max(found))
        spread = f"; {'95 %' if sure else f'{len(found)} seeds'}: {low:.2f} to {high:.2f}" if len(found) > 1 else ""
        level = arrived and (low <= 1 <= high or (sure is None and abs(middle - 1) < TIE))
        side = "level with" if level else "ahead of" if middle > 1 else "behind"
        sides[side].append(f"{name} ({'' if arrived else 'at least '}{middle:.2f}x{spread})")
    listed = [f"{side} {', '.join(names) if names else 'nobody'}" for side, names in sides.items()]
    return f"Time to {100 * main:.3g} %, theirs over ours: pride is {'; '.join(listed)}."


def finish(groups: Mapping[str, Rows]) -> str:
    """Ours at the end beside the best other there, in points, on the seeds that both ran."""
    others = {n: rows for n, rows in groups.items() if n != ORACLE and not n.startswith(OURS)}
    if OURS not in groups or not others:
        return ""
    best = max(others, key=lambda name: float(np.mean([row["full_mean"] for row in others[name]])))
    mine = {row["spec"]["seed"]: row["full_mean"] for row in groups[OURS]}
    gaps = [100 * (mine[s] - r["full_mean"]) for r in others[best] if (s := r["spec"]["seed"]) in mine]
    if not gaps:
        return ""
    mean, half = float(np.mean(gaps)), half_width(gaps)
    seeds = f"{len(gaps)} seed{'s' * (len(gaps) > 1)}"
    sure = seeds if half is None else f"95 %: {mean - half:+.2f} to {mean + half:+.2f}"
    return f"\n\nAt the end, on all test images, ours less {best}'s: {mean:+.2f} points ({sure})."


def thrift(groups: Mapping[str, Rows]) -> str:
    """What ours says up to a target beside the thriftiest of those that arrive hardly later."""
    found = []
    for target in targets_of(groups) if OURS in groups else ():
        ours, bytes_of = reached(groups[OURS], target), {}
        for name, rows in groups.items():
            at = reached(rows, target)
            if name == ORACLE or name.startswith(OURS) or ours is None or at is None:
                continue
            if at <= NEAR * ours:
                bytes_of[name] = median([bytes_to(row, target) for row in rows]) or 0.0
        if bytes_of:
            name = min(bytes_of, key=bytes_of.__getitem__)
            share = (median([bytes_to(row, target) for row in groups[OURS]]) or 0.0) / bytes_of[name]
            found.append(f"to {100 * target:.3g} % {share:.2g}x those of {name}")
    who = f"the thriftiest that arrives within {NEAR} times our time"
    return f"\n\nBytes, ours over those of {who}: {'; '.join(found)}." if found else ""


def _line(axes: Axes, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], index: int, name: str) -> None:
    dashed = name == ORACLE
    axes.plot(x, y, color="#777f88" if dashed else style.hue(index), linestyle="--" if dashed else "-")


def draw(groups: Mapping[str, Rows], out: Path) -> None:
    """Left: accuracy over time. Right: accuracy over bytes. The best few by accuracy at the end, and the oracle."""
    ranked = sorted(groups, key=lambda name: -float(np.mean([row["mean"][-1] for row in groups[name]])))
    names = [n for n in ranked if n not in (ORACLE, OURS)][: DRAWN_MAX - 1]
    names = [OURS, *names] if OURS in groups else names
    with style.in_theme(style.LIGHT, "league"):
        figure = Figure(figsize=(11.5, 4.2))
        left, right = figure.add_axes((0.05, 0.12, 0.34, 0.78)), figure.add_axes((0.55, 0.12, 0.34, 0.78))
        ends: list[tuple[float, str, str]] = []
        final: list[tuple[float, str, str]] = []
        for i, name in enumerate([*names, *([ORACLE] if ORACLE in groups else [])]):
            times = np.array(groups[name][0]["times"])
            curves = [np.interp(times, *smooth(row)) for row in groups[name]]
            mean = np.mean(curves, axis=0)
            colour = "#777f88" if name == ORACLE else style.hue(i)
            _line(left, times, mean, i, name)
            ends.append((float(mean[-1]), name, colour))
            if name != ORACLE:
                sent = np.mean([np.interp(times, r["times"], r["wan_bytes"]) for r in groups[name]], axis=0) / 1e6
                _line(right, sent[1:], mean[1:], i, name)
                final.append((float(mean[-1]), name, colour))
        low = max(0.5, min(y for y, _, _ in ends) - 0.12)
        for axes, labels, unit in ((left, ends, "virtual seconds"), (right, final, "MB between micro-clouds")):
            axes.set_ylim(low, max(y for y, _, _ in ends) + 0.01)
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g} %")
            axes.set_xlabel(unit)
            style.end_labels(axes, labels)
        left.set_xlim(left=0)
        left.margins(x=0)
        right.set_xscale("log")
        right.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        right.xaxis.set_minor_formatter(lambda x, _: "")
        left.set_title("Accuracy over time")
        right.set_title("Accuracy over bytes")
        out.write_bytes(style.as_png(figure))


def rates_text(rows: Rows, chosen: Mapping[str, float], seeds: Collection[int]) -> str:
    """Mean accuracy over the second half of the tuning runs; the scenarios one after the other in a cell."""
    tried: dict[str, dict[float, dict[str, list[float]]]] = {}
    for row in rows:
        spec = row["spec"]
        if spec["seed"] in seeds:
            late = float(np.mean(row["mean"][len(row["mean"]) // 2 :]))
            of_rate = tried.setdefault(spec["strategy"], {}).setdefault(spec["rate"], {})
            of_rate.setdefault(spec["scenario"], []).append(late)
    rates = sorted({rate for of in tried.values() for rate in of})
    scenarios = sorted({scenario for of in tried.values() for found in of.values() for scenario in found})
    head = f"{' / '.join(scenarios)}, the mean of the seeds where there are two; the chosen one in bold.\n\n"
    lines = ["| strategy | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|" + " --- |" * (len(rates) + 1)]
    for name, of in tried.items():
        cells = [" / ".join(shown(_mean(of.get(rate, {}).get(s)), "{:.3f}") for s in scenarios) for rate in rates]
        cells = [f"**{c}**" if rate == chosen.get(name) else c for c, rate in zip(cells, rates, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return head + "\n".join(lines)


def _mean(found: list[float] | None) -> float | None:
    return None if found is None else sum(found) / len(found)


def write(
    rows: Rows,
    chosen: Mapping[str, float],
    rate_of: Callable[[str, str], float | None],
    about: Mapping[str, str],
    tune_seeds: Sequence[int],
    out: Path,
) -> None:
    """``chosen``: each strategy's learning rate by tuning; ``rate_of``: what it takes in a scenario. ``out``: folder of
    the results and of what is told by hand (``headline.md``); the page lies beside it."""
    broken = [row for row in rows if row["failed"]]
    rows = [row for row in rows if not row["failed"]]
    games: dict[tuple[str, str, float], Rows] = {}
    for row in rows:
        spec = row["spec"]
        if spec["seed"] not in tune_seeds and spec["rate"] == rate_of(spec["strategy"], spec["scenario"]):
            games.setdefault((spec["scenario"], spec["partition"], spec["until_s"]), []).append(row)
    tried = {row["spec"]["rate"] for row in rows if row["spec"]["seed"] in tune_seeds}
    rates = ", ".join(f"{rate:g}" for rate in sorted(tried))
    text = [INTRO.format(parameters=rows[0]["parameters"], rates=rates, seeds=tune_seeds)]
    text.append((out / "headline.md").read_text(encoding="utf-8"))
    for (scenario, partition, until_s), played in games.items():
        groups = by_strategy(played)
        changed = {name: groups.pop(name) for name in list(groups) if "," in name}
        picture = f"{scenario}-{partition}-{until_s:g}.png"
        draw(groups, out / picture)
        what = f" ({about[scenario]})" if about.get(scenario) else ""
        text.append(f"## {scenario}{what}, {partition}, {until_s:g} virtual seconds\n")
        lost = [r for r in broken if (r["spec"]["scenario"], r["spec"]["partition"]) == (scenario, partition)]
        failures = "".join(
            f"Failed: {r['spec']['strategy']}, seed {r['spec']['seed']}: {r['failed']}\n\n" for r in lost
        )
        text.append(
            f"{table(groups)}\n\n{failures}{verdict(groups)}{finish(groups)}{thrift(groups)}\n\n![{scenario}]({out.name}/{picture})\n"
        )
        if changed and OURS in groups:
            table_of_changed = ablations(changed, groups[OURS], main_target(groups))
            text.append(f"Ours with one thing changed:\n\n{table_of_changed}\n")
    text.append(f"## Published claims, and the same settings here\n\n{claims(games)}\n")
    text.append(f"## Learning rates tried\n\n{rates_text(rows, chosen, tune_seeds)}\n")
    text.append("## Every run\n\n| hash of all logs | commit | spec |\n| --- | --- | --- |")
    text += [f"| `{r['log_sha256'][:16]}` | {r['commit']} | `{json.dumps(r['spec'], sort_keys=True)}` |" for r in rows]
    hours = sum(row["cpu_s"] for row in rows) / 3600
    text.append(
        f"\n{len(rows)} runs of one core each, {hours:.1f} core-hours (processor time), tuning included; not "
        "runs that failed, nor those of older code or rates that these replaced.\n"
    )
    (out.parent / "league.md").write_text("\n".join(text), encoding="utf-8")
