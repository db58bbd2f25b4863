"""A peer's status in Prometheus' text format (exposition format 0.0.4).

Law: pure text from a PeerStatus. Labels name peers, kinds, states and reasons, never an address.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from dlion.observe.status import PeerStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str], float | None]
"""Labels and value; None is left out."""


def exposition(status: PeerStatus) -> str:
    """All metrics of one peer."""
    links = sorted(status["links"].items())
    up = sum(link["up"] for _, link in links)
    members = status["members"]
    kinds = [
        (peer, sorted(link.get("sent_bytes_by_kind", {"all": link["sent_bytes"]}).items())) for peer, link in links
    ]
    refused = sorted(status.get("refused", {}).items())
    families = [
        _family("dlion_step", "gauge", "Local steps done.", [({}, status["step"])]),
        _family("dlion_step_duration_seconds", "gauge", "Smoothed.", [({}, status.get("step_s"))]),
        _family("dlion_loss", "gauge", "Training loss, smoothed.", [({}, status["loss"])]),
        _family("dlion_accuracy", "gauge", "Of the last evaluation.", [({}, status["accuracy"])]),
        _family("dlion_batch_size", "gauge", "Samples per local step.", [({}, status["batch"])]),
        _family("dlion_samples_total", "counter", "Samples trained on.", [({}, status.get("samples"))]),
        _family("dlion_samples_per_second", "gauge", "Training speed.", [({}, status["samples_per_s"])]),
        _family("dlion_stall_ratio", "gauge", "Time waited / time trained.", [({}, status["stall_share"])]),
        _family(
            "dlion_sent_bytes_total",
            "counter",
            "Bytes sent.",
            [({"peer": peer, "kind": kind}, count) for peer, by_kind in kinds for kind, count in by_kind],
        ),
        _family("dlion_received_bytes_total", "counter", "Bytes received.", _each(links, "received_bytes")),
        _family("dlion_link_up", "gauge", "1: the link is there.", _each(links, "up")),
        _family("dlion_link_rate_bytes_per_second", "gauge", "Measured.", _each(links, "rate_bps", 0.125)),
        _family("dlion_link_used_bytes_per_second", "gauge", "Last interval.", _each(links, "used_bps", 0.125)),
        _family("dlion_link_rtt_seconds", "gauge", "Round trip.", _each(links, "rtt_s")),
        _family("dlion_update_staleness_steps", "gauge", "Largest, last interval.", [({}, status["staleness_max"])]),
        _family(
            "dlion_updates_rejected_total",
            "counter",
            "Refused messages.",
            [({"peer": p, "reason": r}, n) for p, reasons in refused for r, n in sorted(reasons.items())],
        ),
        _family(
            "dlion_peers",
            "gauge",
            "Peers by state; linked: neighbours.",
            [
                ({"state": "live"}, members["live"]),
                ({"state": "missing"}, members["total"] - members["live"]),
                ({"state": "linked"}, up),
            ],
        ),
        _family(
            "dlion_exchange_cpu_seconds_total",
            "counter",
            "Processor time of the exchange lane.",
            [({}, status.get("exchange_cpu_s"))],
        ),
        _family("dlion_event_loop_lag_seconds", "gauge", "99th percentile.", [({}, status.get("loop_lag_s"))]),
    ]
    return "".join(families)


def _each(links: Iterable[tuple[str, object]], key: str, factor: float = 1.0) -> list[Sample]:
    """One sample per link that has ``key``."""
    held = ((peer, dict(link)) for peer, link in links if isinstance(link, dict))
    return [({"peer": peer}, float(link[key]) * factor) for peer, link in held if key in link]


def _family(name: str, kind: Literal["gauge", "counter"], text: str, samples: Iterable[Sample]) -> str:
    lines = [f"{name}{_labels(labels)} {_number(value)}\n" for labels, value in samples if value is not None]
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{''.join(lines)}" if lines else ""


def _number(value: float) -> str:
    """Whole numbers in full (byte counts must not lose digits), others as Python's shortest."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    quoted = {k: v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for k, v in labels.items()}
    return "{" + ",".join(f'{k}="{v}"' for k, v in quoted.items()) + "}"
