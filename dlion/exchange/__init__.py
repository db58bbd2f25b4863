"""What is said, and what hearing it does. Strategies by name, loaded when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from dlion.named import UnknownNameError

if TYPE_CHECKING:
    from dlion.exchange.base import Exchange

EXCHANGES: Mapping[str, str] = {
    "full": "dlion.exchange.full:Full",
    "dlion": "dlion.exchange.dlion:DLion",
    "maxn": "dlion.exchange.dlion:MaxN",
    "ako": "dlion.exchange.ako:Ako",
    "tfako": "dlion.exchange.tfako:TFAko",
    "gaia": "dlion.exchange.gaia:Gaia",
    "hop": "dlion.exchange.hop:Hop",
    "diloco": "dlion.exchange.diloco:DiLoCo",
    "local-sgd": "dlion.exchange.localsgd:LocalSGD",
    "streaming": "dlion.exchange.streaming:Streaming",
    "sparseloco": "dlion.exchange.sparseloco:SparseLoCo",
    "fedavg": "dlion.exchange.fedavg:FedAvg",
    "noloco": "dlion.exchange.noloco:NoLoCo",
    "choco": "dlion.exchange.choco:Choco",
    "pride": "dlion.exchange.pride:Pride",
}
"""Built-in strategies: name -> ``module:Class``."""

GROUP = "dlion.exchange"
"""Entry point group in which other projects announce theirs."""


def names() -> tuple[str, ...]:
    """All strategies that can be asked for by a plain name, sorted."""
    return tuple(sorted({*EXCHANGES, *(point.name for point in entry_points(group=GROUP))}))


def find(name: str) -> type[Exchange]:
    """The strategy called ``name``: a built-in, an entry point of another project, or ``package.module:Class``.

    Raises UnknownNameError saying what was expected.
    """
    from dlion.exchange.base import Exchange

    points = () if ":" in name or name in EXCHANGES else tuple(entry_points(group=GROUP, name=name))
    where = f"{points[0].module}:{points[0].attr}" if points else EXCHANGES.get(name, name)
    if ":" not in where:
        raise UnknownNameError("exchange", name, "", f"one of {', '.join(names())} or package.module:Class")
    module, _, cls = where.partition(":")
    try:
        found = getattr(import_module(module), cls, None)
    except ModuleNotFoundError as error:
        expected = "a project that is installed, or lies in a folder on PYTHONPATH"
        raise UnknownNameError("exchange", name, str(error), expected) from error
    if not (isinstance(found, type) and issubclass(found, Exchange)):
        why = "nothing of that name there" if found is None else f"it is {found!r}"
        raise UnknownNameError("exchange", name, why, "a subclass of dlion.exchange.base.Exchange")
    return found
