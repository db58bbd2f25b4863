"""Admission: only what the strategy declared, with the types it declared, inside the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.blocks import dense
from dlion.messages import Message
from dlion.wire.admit import Admit

ADMIT = Admit(100, {"grad": {"lr": float, "n": int}, "ask": {}}, {"~beat": {"up": bool, "why": str}}, {"ask": 1})
FIELDS = {"lr": 0.1, "n": 3}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message("grad", fields=FIELDS), None),
        (Message("grad", fields={"lr": 1, "n": 3}), None),
        (Message("~beat", fields={"up": True, "why": ""}), None),
        (Message("grad", fields=FIELDS, blocks=(dense(np.ones(40, np.float32), start=60),)), None),
        (Message("grad", fields=FIELDS, blocks=(dense(np.ones(40, np.float32), start=61),)), "model of 100"),
        (Message("ask"), "0 blocks; expected 1"),
        (Message("ask", blocks=(dense(np.ones(40, np.float32)),)), None),
        (Message("gone"), "not understood"),
        (Message("~other"), "not understood"),
        (Message("grad", fields={"lr": 0.1}), "expected"),
        (Message("grad", fields={"lr": 0.1, "m": 3}), "missing"),
        (Message("grad", fields=FIELDS | {"more": 1}), "expected"),
        (Message("grad", fields={"lr": 0.1, "n": True}), "is a bool"),
        (Message("grad", fields={"lr": True, "n": 1}), "is a bool"),
        (Message("grad", fields={"lr": 0.1, "n": 3.0}), "is a float"),
        (Message("~beat", fields={"up": 1, "why": ""}), "is a int"),
    ],
)
def test_what_is_admitted(message: Message, reason: str | None) -> None:
    answer = ADMIT.check(message)
    assert answer is None if reason is None else answer is not None and reason in answer


@given(st.text(), st.dictionaries(st.text(), st.booleans() | st.integers() | st.floats() | st.text()))
def test_it_answers_whatever_is_said(kind: str, fields: dict[str, Any]) -> None:
    assert ADMIT.check(Message(kind, fields=fields)) is not None or kind == "ask"
    assert ADMIT.check(Message("grad", fields=fields)) is not None or set(fields) == {"lr", "n"}


@pytest.mark.parametrize(("speaks", "own"), [({"~x": {}}, {}), ({}, {"x": {}}), ({"~x": {}}, {"~x": {}})])
def test_a_strategy_cannot_take_a_kind_of_the_node(speaks: dict[str, Any], own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leading ~"):
        Admit(1, speaks, own)
