"""Workloads by name.

Law: an explicit table of modules, imported only when asked for, so that a peer pays for no library it does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import cast

from dlion.learn.workload import Workload, WorkloadSpec

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


def build(spec: WorkloadSpec, peer_index: int, peer_names: Sequence[str], shares: Sequence[float]) -> Workload:
    """The workload of peer ``peer_names[peer_index]``; ``shares`` are the peers' data shares, in any unit above 0.

    Raises ValueError for an unknown name or setting, DataError (``learn.data``) for missing data.
    """
    if len(peer_names) != len(shares) or not 0 <= peer_index < len(shares):
        raise ValueError(f"workload: {len(peer_names)} peers, {len(shares)} shares, peer number {peer_index}")
    return _factory(spec.name)(spec, peer_index, peer_names, shares)


def _factory(name: str) -> Factory:
    module, colon, attribute = WORKLOADS.get(name, name).partition(":")
    if not colon:
        raise ValueError(f"unknown workload {name!r}: expected {', '.join(WORKLOADS)} or package.module:factory")
    try:
        return cast(Factory, getattr(import_module(module), attribute))
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ValueError(f"workload {name!r} needs PyTorch: pip install 'dlion[torch]'") from None
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"workload {name!r}: there is no module {error.name!r}") from None
    except AttributeError:
        raise ValueError(f"workload {name!r}: module {module!r} has no {attribute!r}") from None
