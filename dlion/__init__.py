"""Train one model across many sites with no central server, over the links they really have.

Law: the public names, loaded when asked for; nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlion.blocks import Block as Block
    from dlion.embedded import embed as embed
    from dlion.exchange.base import Exchange as Exchange
    from dlion.learn.workload import Workload as Workload
    from dlion.messages import Message as Message
    from dlion.node import Node as Node

__version__ = "0.1.0"

_PUBLIC: Mapping[str, str] = {
    "Node": "dlion.node",
    "embed": "dlion.embedded",
    "Workload": "dlion.learn.workload",
    "Exchange": "dlion.exchange.base",
    "Message": "dlion.messages",
    "Block": "dlion.blocks",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dlion' has no attribute {name!r}")
