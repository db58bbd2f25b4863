"""Selection, encoding, decoding and applying, measured against copying the same buffer in the same process.

    python scripts/bench_codec.py [--json] [--rounds 15]

Prints a table; with --json one object whose ``ratios`` hold the figures that are promised. Runs are interleaved and
medians are reported, so a busy machine disturbs numerator and denominator alike.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np
import zstandard

from dlion.blocks import Encoding, block_bytes, compress, dense, index_bytes, max_n
from dlion.messages import Message, PeerId, Span
from dlion.selection import Spectrum
from dlion.tensors import Layout
from dlion.wire.codec import decode, encode
from dlion.wire.limits import Limits

ENTRIES = 10_000_000
SHARE = 0.01


def interleaved(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each task, all taken in turn, after one unmeasured round."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            if turn:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def large(rounds: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """(milliseconds, ratios, share of the budget on the wire) for the top 1 % of 10 million float32."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal(ENTRIES, dtype=np.float32)
    target, flat = np.zeros_like(array), np.zeros_like(array)
    limits = Limits.of(ENTRIES)
    layout = Layout(tuple(f"t{n}" for n in range(100)), ((ENTRIES // 100,),) * 100)
    budgets = {e: block_bytes(e, ENTRIES, int(SHARE * ENTRIES)) for e in Encoding}

    def select_encode(encoding: Encoding) -> bytes:
        block = compress(array, budgets[encoding], encoding=encoding)
        assert block is not None
        return encode(Message("u", blocks=(block,)))

    def second_link() -> object:
        return compress(array, budgets[Encoding.I8] // 2, encoding=Encoding.I8, spectrum=shared)

    sent = {e: select_encode(e) for e in Encoding}
    bare = len(encode(Message("u")))
    used = {e.name: (len(data) - bare) / budgets[e] for e, data in sent.items()}
    shared = Spectrum(array)
    shared.top(int(SHARE * ENTRIES))
    tasks: dict[str, Callable[[], object]] = {
        "copy (new buffer)": array.copy,
        "copy (into a warm buffer)": lambda: np.copyto(target, array),
        "second link, shared spectrum": second_link,
        "max_n, 100 tensors": lambda: max_n(array, layout, budgets[Encoding.F32]),
    }
    for e in (Encoding.F32, Encoding.I8):
        tasks[f"select + encode {e.name}"] = lambda e=e: select_encode(e)  # type: ignore[misc]
        tasks[f"decode + apply {e.name}"] = lambda e=e: decode(sent[e], limits).blocks[0].add_to(flat)  # type: ignore[misc]
    seconds = interleaved(tasks, rounds)
    ratios = {"budget_used_min": min(used.values())}
    for suffix, copy in (("", "copy (new buffer)"), ("_warm", "copy (into a warm buffer)")):
        for what, ratio in (
            ("select + encode", "select_encode_in_copies"),
            ("decode + apply", "decode_apply_in_copies"),
        ):
            ratios[ratio + suffix] = (
                max(seconds[f"{what} {e.name}"] for e in (Encoding.F32, Encoding.I8)) / seconds[copy]
            )
    return {name: 1e3 * s for name, s in seconds.items()}, ratios, used


def deltas_zstd(indices: np.ndarray) -> int:
    """The rival: gaps as one byte each, with 255 as an escape to four more, then zstd level 1."""
    gaps = np.diff(indices, prepend=-1) - 1
    wide = gaps >= 255
    plain = np.minimum(gaps, 255).astype(np.uint8).tobytes() + gaps[wide].astype("<u4").tobytes()
    return len(zstandard.ZstdCompressor(level=1).compress(plain))


def positions() -> list[dict[str, float]]:
    """Bytes of i.i.d. positions over the entropy bound n * H(k / n) / 8, for both ways of writing them."""
    rng = np.random.default_rng(1)
    size = 4_000_000
    rows = []
    for share in np.geomspace(0.001, 0.1, 13):
        indices = np.flatnonzero(rng.random(size, dtype=np.float32) < share)
        p = len(indices) / size
        bound = -size * (p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8
        rows.append(
            {
                "density": float(share),
                "elias_fano": index_bytes(len(indices), size) / bound,
                "deltas_zstd": deltas_zstd(indices) / bound,
            }
        )
    return rows


def small() -> dict[str, float]:
    """Microseconds for a toy job's message: one block of 64 float32 entries."""
    array = np.random.default_rng(2).standard_normal(64).astype(np.float32)
    limits = Limits.of(64)
    span = Span(PeerId("a1"), 5, 5)
    full = dense(array)
    part = compress(array, 160, encoding=Encoding.F32)
    assert part is not None and part.indices is not None
    result = {}
    for name, block in (("dense", full), ("sparse", part)):
        message = Message("grad", 5, 1, {"loss": 0.5}, (block,), (span,), origin=PeerId("a1"))
        data = encode(message)
        for verb, task in (("encode", lambda m=message: encode(m)), ("decode", lambda d=data: decode(d, limits))):  # type: ignore[misc]
            result[f"{verb} {name}"] = min(batch_us(task) for _ in range(15))
    result["compress dense"] = min(batch_us(lambda: compress(array, 1 << 12, encoding=Encoding.F32)) for _ in range(15))
    result["compress sparse"] = min(batch_us(lambda: compress(array, 160, encoding=Encoding.F32)) for _ in range(15))
    return result


def batch_us(task: Callable[[], object], count: int = 500) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        task()
    return (time.perf_counter() - begin) / count * 1e6


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
@click.option("--rounds", default=15, show_default=True, help="Interleaved rounds of the large tasks.")
def main(as_json: bool, rounds: int) -> None:
    """Bench blocks and wire."""
    milliseconds, ratios, used = large(rounds)
    rows, microseconds = positions(), small()
    ratios["index_bytes_of_entropy_max"] = max(row["elias_fano"] for row in rows)
    if as_json:
        json.dump(
            {
                "ratios": ratios,
                "budget_used": used,
                "milliseconds": milliseconds,
                "small_message_us": microseconds,
                "positions": rows,
            },
            sys.stdout,
        )
        return
    for title, table, unit in (
        (f"{ENTRIES:,} float32, top {SHARE:.0%}", milliseconds, "ms"),
        ("small message, 64 entries", microseconds, "us"),
        ("share of the budget on the wire", used, ""),
        ("ratios", ratios, ""),
    ):
        print(f"\n{title}")
        for name, value in table.items():
            print(f"  {name:32} {value:9.3f} {unit}")
    print("\nbytes of positions over the entropy bound\n  density   Elias-Fano   deltas + zstd")
    for row in rows:
        print(f"  {row['density']:7.2%}   {row['elias_fano']:10.3f}   {row['deltas_zstd']:13.3f}")


if __name__ == "__main__":
    main()
