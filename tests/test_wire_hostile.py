"""Hostile bytes: whatever is wrong, the answer is Malformed, before memory is spent."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dlion.blocks import SCALE_MAX, Encoding, dense, index_bytes, sparse
from dlion.messages import Hello, Message, PeerId, Span
from dlion.wire import positions
from dlion.wire.codec import HELLO_BYTES_MAX, VALUE_MAX, Malformed, decode, decode_hello, encode, encode_hello
from dlion.wire.limits import Limits

MODEL = 3_000
LIMITS = Limits.of(MODEL)
ARRAY = np.random.default_rng(2).standard_normal(MODEL).astype(np.float32)
ZEROS = np.zeros(MODEL, dtype=np.float32)
F32, F16, I8, I4 = Encoding
SPARSE, ZSTD = 1, 2


def good_message() -> bytes:
    blocks = (
        dense(ARRAY[:20]),
        sparse(ARRAY[:500], np.arange(0, 500, 17), I8, start=100),
        sparse(ARRAY, np.arange(0, MODEL, 250), I4),
        dense(ARRAY[:9], F16, start=4),
        dense(ZEROS, I8),
    )
    return encode(Message("g", 3, 1, {"a": 1.5, "b": "x"}, blocks, (Span(PeerId("p"), 1, 3),), origin=PeerId("p")))


def raw(headers: Any = (), body: bytes = b"", **changes: Any) -> bytes:
    """A message written by hand: any envelope, any headers, any body."""
    parts = {
        "kind": "g",
        "step": 0,
        "epoch": 0,
        "origin": "p",
        "stream": 1,
        "fields": {},
        "coverage": [],
        "headers": headers,
    }
    parts.update(changes)
    envelope = msgspec.msgpack.encode(list(parts.values()))
    return (len(envelope) << 8 | 1).to_bytes(4, "little") + envelope + bytes(-len(envelope) % 4) + body


def padded(body: bytes) -> bytes:
    return body + bytes(-len(body) % 4)


def indexed(count: int, size: int, index: bytes) -> bytes:
    return raw([[0, size, count, F32, SPARSE, 4 * count]], padded(bytes(4 * count) + index))


def test_the_hand_written_form_is_the_real_one() -> None:
    """Guards the tests below: without a fault these bytes are a message."""
    assert decode(raw(), LIMITS).kind == "g"
    index = b"".join(map(bytes, positions.write(np.array([1, 5, 90], np.uint32), 100)))
    block = decode(indexed(3, 100, index), LIMITS).blocks[0]
    assert block.indices is not None and block.indices.tolist() == [1, 5, 90]
    frame = zstandard.compress(bytes(4 * MODEL))
    assert decode(raw([[0, MODEL, MODEL, F32, ZSTD, len(frame)]], padded(frame)), LIMITS).blocks[0].count == MODEL


def test_truncated_at_every_byte_and_with_a_tail() -> None:
    data = good_message()
    for stop in range(len(data)):
        with pytest.raises(Malformed):
            decode(data[:stop], LIMITS)
    for tail in (b"\0", bytes(4), b"more"):
        with pytest.raises(Malformed):
            decode(data + tail, LIMITS)


@settings(max_examples=600)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_are_malformed_or_harmless(flips: list[tuple[int, int]]) -> None:
    data = bytearray(good_message())
    for place, bit in flips:
        data[place % len(data)] ^= 1 << bit
    flat = np.zeros(MODEL, dtype=np.float32)
    try:
        message = decode(data, LIMITS)
    except Malformed:
        return
    for block in message.blocks:
        assert np.isfinite(block.values).all()
        if block.indices is not None:
            assert (np.diff(block.indices.astype(np.int64)) > 0).all()
        with np.errstate(over="ignore", invalid="ignore"):
            block.add_to(flat)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes(data: bytes, prefixed: bool) -> None:
    if prefixed:
        data = (len(data) << 8 | 1).to_bytes(4, "little") + data
    with pytest.raises(Malformed):
        decode(data, LIMITS)


HEADERS = {
    "range beyond the model": [1, MODEL, 0, F32, SPARSE, 0],
    "count above size": [0, 5, 6, F32, SPARSE, 24],
    "dense with another count": [0, 5, 4, F32, 0, 16],
    "bad encoding": [0, 5, 5, 9, 0, 20],
    "unknown flag": [0, 5, 5, F32, 4, 20],
    "stored too short": [0, 5, 5, F32, 0, 16],
    "stored too long": [0, 5, 5, F32, 0, 24],
    "zstd longer than plain": [0, 5, 5, F32, ZSTD, 24],
    "negative start": [-1, 5, 5, F32, 0, 20],
    "negative size": [0, -5, -5, F32, 0, 20],
    "huge start": [1 << 63, 5, 5, F32, 0, 20],
    "huge size and count": [0, 1 << 52, 1 << 52, F32, 0, 1 << 54],
    "float where an int belongs": [0.0, 5, 5, F32, 0, 20],
    "too few numbers": [0, 5, 5, F32, 0],
    "too many numbers": [0, 5, 5, F32, 0, 20, 0],
}


@pytest.mark.parametrize("name", HEADERS)
def test_lying_headers(name: str) -> None:
    head = HEADERS[name]
    for body in (bytes(20), bytes(24), bytes(16), b""):
        with pytest.raises(Malformed):
            decode(raw([head], body), LIMITS)


ENVELOPES: dict[str, dict[str, Any]] = {
    "too many blocks": {"headers": [[0, 0, 0, 0, 0, 0]] * (LIMITS.blocks_max + 1)},
    "more entries than the limit": {"headers": [[0, MODEL, MODEL, I8, ZSTD, 20]] * 5, "body": bytes(100)},
    "too many fields": {"fields": {f"f{n}": n for n in range(LIMITS.fields_max + 1)}},
    "too many spans": {"coverage": [["p", 1, 1]] * (LIMITS.coverage_max + 1)},
    "backward span": {"coverage": [["p", 2, 1]]},
    "negative span": {"coverage": [["p", -2, 1]]},
    "huge span": {"coverage": [["p", 0, 1 << 60]]},
    "short span": {"coverage": [["p", 2]]},
    "span of a long name": {"coverage": [["p" * 257, 1, 2]]},
    "long kind": {"kind": "k" * 257},
    "long origin": {"origin": "k" * 257},
    "long key": {"fields": {"k" * 257: 1}},
    "long text": {"fields": {"k": "x" * (LIMITS.text_chars_max + 1)}},
    "NaN in a field": {"fields": {"loss": float("nan")}},
    "infinite field": {"fields": {"loss": float("-inf")}},
    "huge field": {"fields": {"n": 1 << 63}},
    "nested field": {"fields": {"a": [1]}},
    "null field": {"fields": {"a": None}},
    "bytes field": {"fields": {"a": b"x"}},
    "number as key": {"fields": {1: 1}},
    "negative step": {"step": -1},
    "huge step": {"step": 1 << 60},
    "text step": {"step": "1"},
    "huge epoch": {"epoch": (1 << 64) - 1},
    "unknown stream": {"stream": 3},
    "unknown part": {"more": 1},
    "long envelope": {"fields": {str(n): "x" * 4000 for n in range(64)} | {"z": "x" * 9000}},
}


@pytest.mark.parametrize("name", ENVELOPES)
def test_impossible_envelopes(name: str) -> None:
    with pytest.raises(Malformed):
        decode(raw(**ENVELOPES[name]), LIMITS)


def test_other_versions_bad_padding_and_oversize() -> None:
    data = bytearray(raw(kind="ggg"))
    length = int.from_bytes(data[:4], "little") >> 8
    assert length % 4
    data[4 + length] = 1
    with pytest.raises(Malformed, match="not zero"):
        decode(data, LIMITS)
    data[0] = 2
    with pytest.raises(Malformed, match="version 2"):
        decode(data, LIMITS)
    with pytest.raises(Malformed, match="expected 4 to"):
        decode(bytes(LIMITS.message_bytes_max + 1), LIMITS)


BITS: dict[str, Callable[[], bytes]] = {
    "NaN": lambda: raw([[0, 2, 2, F32, 0, 8]], np.array([1, np.nan], "<f4").tobytes()),
    "Inf": lambda: raw([[0, 2, 2, F32, 0, 8]], np.array([1, np.inf], "<f4").tobytes()),
    "both infinities": lambda: raw([[0, 2, 2, F32, 0, 8]], np.array([np.inf, -np.inf], "<f4").tobytes()),
    "half NaN": lambda: raw([[0, 2, 2, F16, 0, 4]], np.array([1, np.nan], "<f2").tobytes()),
    "half Inf": lambda: raw([[0, 2, 2, F16, 0, 4]], np.array([1, -np.inf], "<f2").tobytes()),
    "NaN scale": lambda: raw([[0, 4, 4, I8, 0, 8]], np.array([np.nan], "<f4").tobytes() + bytes(4)),
    "infinite scale": lambda: raw([[0, 4, 4, I4, 0, 6]], padded(np.array([np.inf], "<f4").tobytes() + bytes(2))),
    "negative scale": lambda: raw([[0, 4, 4, I8, 0, 8]], np.array([-1], "<f4").tobytes() + bytes(4)),
    "overflowing scale": lambda: raw([[0, 4, 4, I8, 0, 8]], np.array([SCALE_MAX * 2], "<f4").tobytes() + bytes(4)),
}


@pytest.mark.parametrize("name", BITS)
def test_numbers_that_are_not_finite(name: str) -> None:
    with pytest.raises(Malformed, match=r"NaN or infinite|scale"):
        decode(BITS[name](), LIMITS)


def test_the_largest_scale_times_the_lowest_code_is_finite() -> None:
    body = np.array([VALUE_MAX / 128], "<f4").tobytes() + b"\x80\x7f\x80\x7f"
    assert np.isfinite(decode(raw([[0, 4, 4, I8, 0, 8]], body), LIMITS).blocks[0].values).all()


@pytest.mark.parametrize("value", [2e30, -2e30, 3e38])
def test_a_finite_but_absurd_value_is_refused(value: float) -> None:
    """A few of them would make the weights infinite; one that is merely huge (1e29) passes."""
    for values in ([value, 0, 0, 0], [1e29, -1e29, 1e20, 1]):
        body = raw([[0, 4, 4, Encoding.F32, 0, 16]], np.array(values, "<f4").tobytes())
        if abs(values[0]) > VALUE_MAX:
            with pytest.raises(Malformed, match="beyond"):
                decode(body, LIMITS)
        else:
            decode(body, LIMITS)


def elias_fano(pairs: list[tuple[int, int]], size: int, count: int) -> bytes:
    """Written by hand for 8 low bits: (upper, lower) as given, however wrong."""
    lower = bytes(low for _, low in pairs)
    bitmap = np.zeros(8 * (index_bytes(count, size) - count), dtype=np.uint8)
    for n, (upper, _) in enumerate(pairs):
        bitmap[upper + n] = 1
    return lower + np.packbits(bitmap).tobytes()


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ([(0, 9), (0, 9), (1, 0), (2, 5)], "ascending"),
        ([(0, 9), (0, 8), (1, 0), (2, 5)], "ascending"),
        ([(0, 1), (0, 9), (1, 0), (4, 200)], "range"),
        ([(0, 1), (0, 9), (1, 0)], "announced"),
        ([(0, 1), (0, 9), (1, 0), (2, 5), (3, 0)], "announced"),
    ],
)
def test_positions_that_repeat_go_back_or_leave_the_range(pairs: list[tuple[int, int]], match: str) -> None:
    size, count = 1100, 4
    index = elias_fano(pairs, size, count)[: index_bytes(count, size)]
    if len(pairs) != count:
        index = (bytes(count) + elias_fano(pairs, size, count)[len(pairs) :])[: index_bytes(count, size)]
    with pytest.raises(Malformed, match=match):
        decode(indexed(count, size, index), LIMITS)


def test_a_bitmap_with_a_position_in_its_padding() -> None:
    bitmap = bytearray(np.packbits(np.ones(10, np.uint8)).tobytes())
    bitmap[-1] = 0b01100000
    with pytest.raises(Malformed, match=r"announced|range"):
        decode(indexed(10, 10, bytes(bitmap)), LIMITS)


def bomb(declared: int, sized: bool = True) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=sized)
    if sized:
        return compressor.compress(bytes(declared))
    stream = compressor.compressobj()
    return stream.compress(bytes(declared)) + stream.flush()


def lying_frame() -> bytes:
    """Declares 12000 bytes and holds more."""
    honest, longer = bytearray(bomb(12_000)), bomb(12_001)
    at = next(n for n in range(len(honest)) if honest[n] != longer[n])
    frame = bytearray(longer)
    frame[at] = honest[at]
    return bytes(frame)


FRAMES: dict[str, Callable[[], bytes]] = {
    "unsized": lambda: bomb(4 * MODEL, sized=False),
    "declares more": lambda: bomb(4 * MODEL + 1),
    "declares less": lambda: bomb(4 * MODEL - 1),
    "holds more than declared": lying_frame,
    "two frames": lambda: bomb(4 * MODEL) + bomb(4 * MODEL),
    "tail": lambda: bomb(4 * MODEL) + b"tail",
    "not zstd": lambda: b"no frame at all",
    "cut": lambda: bomb(4 * MODEL)[:-3],
    "empty": lambda: b"",
}


@pytest.mark.parametrize("name", FRAMES)
def test_zstd_frames_that_lie(name: str) -> None:
    frame = FRAMES[name]()
    with pytest.raises(Malformed, match="zstd"):
        decode(raw([[0, MODEL, MODEL, F32, ZSTD, len(frame)]], padded(frame)), LIMITS)


def test_a_bomb_of_512_mib_costs_no_memory() -> None:
    """One declared in the frame, one in the header: both are refused unopened."""
    big = 512 << 20
    frame = bytearray(bomb(1 << 20))
    declared = zstandard.get_frame_parameters(frame)
    assert declared.content_size == 1 << 20
    at = bytes(frame).index((1 << 20).to_bytes(4, "little"))
    frame[at : at + 4] = big.to_bytes(4, "little")
    assert zstandard.frame_content_size(bytes(frame)) == big
    tracemalloc.start()
    try:
        for head in ([0, MODEL, MODEL, F32, ZSTD, len(frame)], [0, big // 4, big // 4, F32, ZSTD, len(frame)]):
            with pytest.raises(Malformed):
                decode(raw([head], padded(bytes(frame))), LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


HELLO = Hello(
    protocol_min=1, protocol_max=1, run="r", peer="p", incarnation=1, role="t", job="j", model="m", cursors={}, of=0
)


def hello_bytes(**changes: Any) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.decode(encode_hello(HELLO)) | changes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        hello_bytes(more=1),
        hello_bytes(of=-1),
        hello_bytes(cursors={0: -5}),
        hello_bytes(cursors={0: 1 << 62}),
        hello_bytes(peer=5),
        hello_bytes(run="r" * HELLO_BYTES_MAX),
        hello_bytes() + b"x",
    ],
)
def test_impossible_hellos(data: bytes) -> None:
    with pytest.raises(Malformed):
        decode_hello(data)
    assert decode_hello(hello_bytes()) == HELLO, "without the change it is a hello"
