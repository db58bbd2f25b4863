"""A strict reader of Prometheus' text format, enough for tests."""

from __future__ import annotations

import re

SAMPLE = re.compile(r'^([a-z_]+)(\{(?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*\})? (-?[0-9.e+-]+)$')


def parse_exposition(text: str) -> dict[str, str]:
    """Name with labels -> value; asserts that every sample follows its own HELP and TYPE, each family once."""
    found: dict[str, str] = {}
    families: list[str] = []
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            families.append(line.split(" ")[2])
            assert families.count(families[-1]) == 1
        elif line.startswith("# TYPE "):
            assert line.split(" ")[2] == families[-1]
            assert line.split(" ")[3] in ("gauge", "counter")
            assert (line.split(" ")[3] == "counter") == families[-1].endswith("_total")
        else:
            match = SAMPLE.match(line)
            assert match, line
            assert match[1] == families[-1]
            found[match[1] + (match[2] or "")] = match[3]
    return found
