"""Workloads by name.

Law: an explicit table of modules, imported only when asked for, so that a peer pays for no library it does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import cast

from dlion.learn.workload import Workload, WorkloadSpec
from dlion.named import UnknownNameError

Factory = Callable[[WorkloadSpec, int, Sequence[str], Sequence[float]], Workload]
"""(spec, this peer's index, all peers' names, all peers' data shares) -> the workload of this peer."""

WORKLOADS: Mapping[str, str] = {
    "toy": "dlion.learn.workloads.toy:build",
    "digits": "dlion.learn.workloads.digits:build",
    "fashion-mnist": "dlion.learn.workloads.idx:build",
    "mnist": "dlion.learn.workloads.idx:build",
    "fashion-cnn": "dlion.learn.workloads.fashion_cnn:build",
    "shakespeare-gpt": "dlion.learn.workloads.shakespeare_gpt:build",
}


def check(name: str) -> None:
    """Raises UnknownNameError for a name that is neither known nor that of a factory."""
    if ":" not in WORKLOADS.get(name, name):
        raise UnknownNameError("workload", name, "", f"one of {', '.join(WORKLOADS)} or package.module:factory")


def build(spec: WorkloadSpec, peer_index: int, peer_names: Sequence[str], shares: Sequence[float]) -> Workload:
    """The workload of peer ``peer_names[peer_index]``; ``shares`` are the peers' data shares, in any unit above 0.

    Raises UnknownNameError, ValueError for an unknown setting, DataError (``learn.data``) for missing data.
    """
    if len(peer_names) != len(shares) or not 0 <= peer_index < len(shares):
        raise ValueError(f"workload: {len(peer_names)} peers, {len(shares)} shares, peer number {peer_index}")
    return _factory(spec.name)(spec, peer_index, peer_names, shares)


def _factory(name: str) -> Factory:
    check(name)
    module, _, attribute = WORKLOADS.get(name, name).partition(":")
    try:
        return cast(Factory, getattr(import_module(module), attribute))
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise UnknownNameError("workload", name, "it needs PyTorch: pip install 'dlion[torch]'") from None
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UnknownNameError("workload", name, f"there is no module {error.name!r}") from None
    except AttributeError:
        raise UnknownNameError("workload", name, f"module {module!r} has no {attribute!r}") from None
