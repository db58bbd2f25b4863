"""The codec: what goes in comes out, bit for bit; an independent reader understands the envelope; sizes hold."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.blocks import Block, Encoding, block_bytes, dense, index_bytes, sparse
from dlion.messages import Hello, Message, PeerId, Span, Stream
from dlion.wire import positions
from dlion.wire.codec import Malformed, decode, decode_hello, encode, encode_hello
from dlion.wire.limits import Limits

MODEL = 5_000
LIMITS = Limits.of(MODEL)
NATURAL = st.integers(0, (1 << 53) - 1)
TEXT = st.text(max_size=20)
SCALARS = (
    st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)


@st.composite
def some_blocks(draw: st.DrawFn) -> Block:
    size = draw(st.integers(0, 1500))
    start = draw(st.integers(0, MODEL - size))
    encoding = draw(st.sampled_from(Encoding))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    array = rng.standard_normal(size).astype(np.float32) * (rng.random(size) < draw(st.sampled_from([0.05, 1.0])))
    if draw(st.booleans()):
        return dense(array.astype(np.float32), encoding, start=start)
    picked = np.flatnonzero(rng.random(size) < draw(st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0])))
    return sparse(array.astype(np.float32), picked, encoding, start=start)


def assert_same_block(a: Block, b: Block) -> None:
    assert (a.start, a.size, a.encoding, a.count) == (b.start, b.size, b.encoding, b.count)
    assert a.values.tobytes() == b.values.tobytes()
    assert (a.indices is None) == (b.indices is None)
    if a.indices is not None and b.indices is not None:
        assert np.array_equal(a.indices, b.indices)


@given(
    st.builds(
        Message,
        TEXT,
        NATURAL,
        NATURAL,
        st.dictionaries(TEXT, SCALARS, max_size=5),
        st.lists(some_blocks(), max_size=3).map(tuple),
        st.lists(st.builds(lambda o, a, b: Span(o, min(a, b), max(a, b)), TEXT, NATURAL, NATURAL), max_size=4).map(
            tuple
        ),
        st.sampled_from(Stream),
        TEXT,
    ),
    st.integers(0, 3),
)
def test_round_trip(message: Message, offset: int) -> None:
    """Every kind of block and field, from a buffer of any alignment, within the promised size."""
    data = encode(message)
    again = decode(memoryview(bytes(offset) + data)[offset:], LIMITS, hop=PeerId("h"), seq=9)
    for name in ("kind", "step", "epoch", "fields", "coverage", "stream", "origin"):
        assert getattr(again, name) == getattr(message, name)
    assert {k: type(v) for k, v in again.fields.items()} == {k: type(v) for k, v in message.fields.items()}
    assert (again.hop, again.seq) == ("h", 9)
    assert len(again.blocks) == len(message.blocks)
    for a, b in zip(message.blocks, again.blocks, strict=True):
        assert_same_block(a, b)
    bare = len(
        encode(
            Message(
                message.kind, message.step, message.epoch, message.fields, (), message.coverage, origin=message.origin
            )
        )
    )
    assert len(data) <= bare + sum(b.nbytes_max for b in message.blocks)


@given(st.integers(1, 200_000), st.data())
def test_positions_take_the_bytes_that_were_priced(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, min(size, 2_000)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    indices = np.sort(rng.choice(size, count, replace=False)).astype(np.uint32)
    parts = positions.write(indices, size)
    written = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    assert len(written) == index_bytes(count, size)
    assert np.array_equal(positions.read(written, count, size), indices)


@pytest.mark.parametrize("indices", [[0], [(1 << 32) - 1], [0, 1, 2, (1 << 32) - 2], list(range(70))])
def test_positions_in_a_range_of_four_thousand_million(indices: list[int]) -> None:
    size = 1 << 32
    array = np.array(indices, dtype=np.uint32)
    written = np.concatenate(positions.write(array, size))
    assert len(written) == index_bytes(len(array), size)
    assert np.array_equal(positions.read(written, len(array), size), array)


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("zeros", [True, False])
def test_zstd_is_used_where_it_pays_and_changes_nothing(encoding: Encoding, zeros: bool) -> None:
    array = np.random.default_rng(3).standard_normal(1 << 16).astype(np.float32)
    if zeros:
        array[50:] = 0
    block = dense(array, encoding)
    data = encode(Message("m", blocks=(block,)))
    if zeros:
        assert len(data) < block.nbytes_max / 4
    elif encoding is not Encoding.I4:
        assert len(data) > block.nbytes_max - 60
    assert_same_block(block, decode(data, Limits.of(block.size)).blocks[0])


@given(some_blocks(), st.integers(0, 3))
def test_a_block_that_was_heard_goes_on_in_its_bytes(block: Block, offset: int) -> None:
    """In another message, too; and after those bytes have gone from wherever they came."""
    first = encode(Message("m", blocks=(block,)))
    heard = decode(memoryview(bytes(offset) + first)[offset:], LIMITS).blocks[0]
    again = encode(Message("longer", 3, blocks=(block, heard)))
    assert again == encode(Message("longer", 3, blocks=(block, block)))
    for found in decode(again, LIMITS).blocks:
        assert_same_block(block, found)


def test_padding_is_zero() -> None:
    data = encode(Message("m", blocks=(dense(np.ones(3, dtype=np.float32), Encoding.F16),)))
    assert decode(data, LIMITS).blocks[0].count == 3
    with pytest.raises(Malformed, match="bytes after a body are not zero"):
        decode(data[:-1] + b"x", LIMITS)


def test_what_was_heard_is_not_compressed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not compress is passed on as he speaks: a second pass would cost a bridge more than it saves."""
    block = dense(np.ones(1 << 16, dtype=np.float32))
    with monkeypatch.context() as patch:
        patch.setattr("dlion.wire.codec.ZSTD_BYTES_MIN", 1 << 30)
        plain = encode(Message("m", blocks=(block,)))
    assert len(encode(Message("m", blocks=(block,)))) < len(plain) / 10
    assert encode(decode(plain, Limits.of(block.size))) == plain


def test_a_frame_does_not_depend_on_thread_or_frames_before() -> None:
    rng = np.random.default_rng(4)
    blocks = [dense(rng.standard_normal(size).astype(np.float32), Encoding.I4) for size in (1 << 16, 1 << 17)]
    first, other = (Message("m", blocks=(block,)) for block in blocks)
    alone = encode(first)
    encode(other)
    assert encode(first) == alone
    limits = Limits.of(blocks[0].size)
    with pytest.raises(Malformed, match="zstd"):
        decode(alone[:-9] + bytes([*(byte ^ 255 for byte in alone[-9:])]), limits)
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: encode(first), range(64))) == {alone}
        for found in threads.map(lambda _: decode(alone, limits), range(64)):
            assert_same_block(blocks[0], found.blocks[0])


def test_an_independent_reader_understands_the_envelope() -> None:
    block = sparse(np.arange(100, dtype=np.float32), np.array([3, 97]), Encoding.F32, start=7)
    message = Message(
        "grad", 4, 2, {"loss": 0.5, "n": 3}, (block,), (Span(PeerId("a"), 3, 4),), Stream.BULK, PeerId("a")
    )
    data = encode(message)
    word = int.from_bytes(data[:4], "little")
    length = word >> 8
    assert word & 255 == 1
    envelope = msgpack.unpackb(data[4 : 4 + length])
    assert envelope == ["grad", 4, 2, "a", 2, {"loss": 0.5, "n": 3}, [["a", 3, 4]], [[7, 100, 2, 0, 1, 8]]]
    body = data[4 + length + -length % 4 :]
    assert np.frombuffer(body, "<f4", 2).tolist() == [3.0, 97.0]
    assert len(data) % 4 == 0


def test_decoded_values_are_views_of_an_aligned_buffer() -> None:
    data = encode(Message("m", blocks=(dense(np.ones(64, dtype=np.float32)),)))
    block = decode(data, LIMITS).blocks[0]
    assert block.values.base is not None and not block.values.flags.writeable


def test_numpy_scalars_in_fields_become_plain_numbers() -> None:
    data = encode(Message("m", fields={"loss": np.float32(0.5), "n": np.int64(3)}))  # type: ignore[dict-item]
    assert decode(data, LIMITS).fields == {"loss": 0.5, "n": 3}


@given(st.dictionaries(st.integers(0, 5), NATURAL, max_size=3), st.binary(max_size=40))
def test_hello_round_trip(cursors: dict[int, int], proof: bytes) -> None:
    hello = Hello(
        protocol_min=1,
        protocol_max=1,
        run="r",
        peer="a1",
        incarnation=7,
        role="trainer",
        job="j",
        model="m",
        cursors=cursors,
        of=3,
        proof=proof,
    )
    assert decode_hello(encode_hello(hello)) == hello


def test_the_price_of_a_block_is_what_its_bytes_come_to() -> None:
    """Not only a bound: header and padding allowance are the only slack."""
    array = np.random.default_rng(5).standard_normal(MODEL).astype(np.float32)
    bare = len(encode(Message("m")))
    for encoding in Encoding:
        block = sparse(array, np.arange(0, MODEL, 50), encoding)
        price = block_bytes(encoding, MODEL, block.count)
        assert price - 40 <= len(encode(Message("m", blocks=(block,)))) - bare <= price
