"""Messages <-> bytes.

Law: owns the format of one message and trusts no byte of it; knows no socket, no session, no strategy.

    u8 version | u24 length of the envelope | envelope (msgpack) | 0 to 3 zero bytes | body of each block

A body is ``scales, codes`` (one zstd frame when its header says so), then the positions (``wire.positions``), then
zero bytes up to a multiple of 4. Every length but that of a zstd frame follows from the header, and all numbers are
little-endian. Decoding guarantees: no value beyond VALUE_MAX, blocks inside the model, strictly ascending positions,
finite fields, bounded everything. Whether the kind and its fields mean something is for ``wire.admit``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from dlion.blocks import GROUP, Block, Encoding, index_bytes, value_bytes
from dlion.messages import Hello, Message, PeerId, Scalar, Span, Stream
from dlion.wire import positions
from dlion.wire.limits import Limits

VERSION = 1
HELLO_BYTES_MAX = 16 << 10
PROBE_BYTES = 16 << 10
"""zstd is tried on this much first, ..."""
SHRUNK_MAX = 0.9
"""... and used when it leaves at most this share: plain floats shrink to 0.92, which is not worth 4 ns a byte."""
ZSTD_BYTES_MIN = 16 << 10
"""Below this the frame costs more time than it can save."""
ZSTD_WINDOW_BYTES_MAX = 8 << 20
INT_MAX = (1 << 53) - 1
CODE_MAX = 128
"""Largest magnitude of an integer code."""
VALUE_MAX = 1e30
"""No larger magnitude is accepted: finite as it is, a few of them would make the weights infinite."""
SCALE_BITS_MAX = np.float32(VALUE_MAX / CODE_MAX).view(np.uint32)
"""Of the largest scale: bits of floats >= 0 order as integers do; those of others, and of NaN, are larger."""
NOBODY = PeerId("")

SPARSE, ZSTD = 1, 2
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")


class _Zstd(threading.local):
    """A context each way for each thread, made once: no two threads may use one at a time."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)


_zstd = _Zstd()


class Malformed(ValueError):  # noqa: N818 - the name callers read
    """These bytes are no message; the text says what is wrong with them."""


Name = Annotated[str, msgspec.Meta(max_length=256)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]
Small = Annotated[int, msgspec.Meta(ge=0, le=3)]


class _Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    start: Natural
    size: Natural
    count: Natural
    encoding: Encoding
    flags: Small
    stored: Natural
    """Bytes of scales and codes as they lie in the body."""


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    kind: Name
    step: Natural
    epoch: Natural
    origin: Name
    stream: Stream
    fields: Mapping[Name, Scalar]
    coverage: tuple[Span, ...]
    headers: list[_Header]


def _plain(value: object) -> object:
    """NumPy scalars in fields travel as plain numbers."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot send a {type(value).__name__} in a field")


_to_bytes = msgspec.msgpack.Encoder(enc_hook=_plain).encode
_to_envelope = msgspec.msgpack.Decoder(_Envelope).decode
_to_hello = msgspec.msgpack.Decoder(Hello).decode
_BAD_MSGPACK = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)


def encode(message: Message) -> bytes:
    """The message without ``hop`` and ``seq``, which belong to each link's session."""
    headers: list[_Header] = []
    parts: list[Any] = [b"", b"", b""]
    for block in message.blocks:
        headers.append(_write_block(block, parts))
    fields = message.fields
    envelope = _to_bytes(
        _Envelope(
            message.kind,
            message.step,
            message.epoch,
            message.origin,
            message.stream,
            fields if type(fields) is dict else dict(fields),
            message.coverage,
            headers,
        )
    )
    length = len(envelope)
    parts[0] = (length << 8 | VERSION).to_bytes(4, "little")
    parts[1] = envelope
    parts[2] = _PAD[length & 3]
    return b"".join(parts)


def _write_block(block: Block, parts: list[Any]) -> _Header:
    """Appends the body to ``parts``. Arrays go in as they are: joining copies them once. A block that was heard goes on
    in the bytes in which it came."""
    header: _Header
    if (heard := vars(block).get("wire")) is not None:
        header, body = heard
        parts.append(body)
        return header
    codes, scales, indices = block.codes, block.scales, block.indices
    flags, count, index_size = 0, block.size, 0
    stored = codes.nbytes if scales is None else codes.nbytes + scales.nbytes
    frame = _shrunk(block) if indices is None and stored >= ZSTD_BYTES_MIN else None
    if frame is not None:
        flags, stored = ZSTD, len(frame)
        parts.append(frame)
    else:
        if scales is not None:
            parts.append(scales)
        parts.append(codes)
    if indices is not None:
        flags |= SPARSE
        count = len(indices)
        index_size = index_bytes(count, block.size)
        parts.extend(positions.write(indices, block.size))
    pad = -(stored + index_size) & 3
    if pad:
        parts.append(bytes(pad))
    return _Header(block.start, block.size, count, block.encoding, flags, stored)


def _shrunk(block: Block) -> bytes | None:
    """Scales and codes as one zstd frame, when a probe says that it pays."""
    compress, codes = _zstd.compressor.compress, block.codes.data
    head = codes[: PROBE_BYTES // codes.itemsize]
    if len(compress(head)) > SHRUNK_MAX * head.nbytes:
        return None
    plain = codes if block.scales is None else memoryview(b"".join((block.scales.data, codes)))
    frame = compress(plain)
    return frame if len(frame) < plain.nbytes else None


def decode(data: bytes | bytearray | memoryview, limits: Limits, *, hop: PeerId = NOBODY, seq: int = 0) -> Message:
    """The message in ``data``, which must not change afterwards: arrays may be views of it. Raises Malformed."""
    total = len(data)
    if not 4 <= total <= limits.message_bytes_max:
        raise Malformed(f"message of {total} bytes; expected 4 to {limits.message_bytes_max}")
    word = int.from_bytes(data[:4], "little")
    length = word >> 8
    at = 4 + length
    if word & 255 != VERSION:
        raise Malformed(f"message version {word & 255}; this peer speaks {VERSION}")
    if at > total or length > limits.envelope_bytes_max:
        raise Malformed(f"envelope of {length} bytes in a message of {total}")
    try:
        envelope = _to_envelope(data[4:at])
    except _BAD_MSGPACK as error:
        raise Malformed(f"envelope: {error}") from None
    _check_envelope(envelope, limits)
    pad = _PAD[length & 3]
    if data[at : at + len(pad)] != pad:
        raise Malformed("bytes between envelope and body are not zero")
    at += len(pad)
    blocks = []
    for header, nbytes in zip(envelope.headers, _body_sizes(envelope.headers, limits, total - at), strict=True):
        block, end = _read_block(header, data, at), at + (nbytes + 3 & ~3)
        if any(data[at + nbytes : end]):
            raise Malformed("bytes after a body are not zero")
        vars(block)["wire"] = header, memoryview(data)[at:end]
        blocks.append(block)
        at = end
    return Message(
        envelope.kind,
        envelope.step,
        envelope.epoch,
        envelope.fields,
        tuple(blocks),
        envelope.coverage,
        envelope.stream,
        PeerId(envelope.origin),
        hop,
        seq,
    )


def _check_envelope(envelope: _Envelope, limits: Limits) -> None:
    fields, coverage = envelope.fields, envelope.coverage
    if len(fields) > limits.fields_max or len(coverage) > limits.coverage_max:
        raise Malformed(f"{len(fields)} fields and {len(coverage)} spans are too many")
    for name, value in fields.items():
        if isinstance(value, str):
            if len(value) > limits.text_chars_max:
                raise Malformed(f"field {name!r} is too long")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise Malformed(f"field {name!r} is not finite")
        elif value >= 1 << 63:
            raise Malformed(f"field {name!r} does not fit 64 bits")
    for origin, first, last in coverage:
        if not 0 <= first <= last <= INT_MAX or len(origin) > 256:
            raise Malformed(f"no span: {origin[:256]!r} {first} to {last}")


def _body_sizes(headers: list[_Header], limits: Limits, nbytes: int) -> list[int]:
    """Length of each body without its padding; every claim of the headers is checked here, before a body is touched."""
    if len(headers) > limits.blocks_max:
        raise Malformed(f"{len(headers)} blocks; at most {limits.blocks_max}")
    sizes = []
    entries = 0
    for head in headers:
        if head.start + head.size > limits.model_size:
            raise Malformed(f"block of {head.start} + {head.size} in a model of {limits.model_size}")
        entries += head.count
        indices = 0
        if head.flags & SPARSE:
            if head.count > head.size:
                raise Malformed(f"{head.count} positions in a range of {head.size}")
            indices = index_bytes(head.count, head.size)
        elif head.count != head.size:
            raise Malformed(f"dense block of {head.count} entries in a range of {head.size}")
        plain = value_bytes(head.encoding, head.count)
        if head.stored > plain or (head.stored != plain and not head.flags & ZSTD):
            raise Malformed(f"{head.stored} bytes of values where {plain} were expected")
        sizes.append(head.stored + indices)
    if entries > limits.entries_max:
        raise Malformed(f"blocks of {entries} entries; at most {limits.entries_max}")
    if (announced := sum(size + 3 & ~3 for size in sizes)) != nbytes:
        raise Malformed(f"bodies of {announced} bytes announced, {nbytes} received")
    return sizes


def _read_block(head: _Header, data: bytes | bytearray | memoryview, at: int) -> Block:
    count, encoding = head.count, head.encoding
    source, offset = data, at
    if head.flags & ZSTD:
        source, offset = _unshrunk(data[at : at + head.stored], value_bytes(encoding, count)), 0
    scales = None
    codes: npt.NDArray[np.generic]
    if encoding is Encoding.F32:
        codes = _view(source, np.float32, count, offset)
    elif encoding is Encoding.F16:
        codes = _view(source, np.float16, count, offset)
    else:
        groups = -(-count // GROUP)
        scales = _view(source, np.float32, groups, offset)
        if groups and np.maximum.reduce(scales.view(np.uint32)) > SCALE_BITS_MAX:
            raise Malformed("a scale is negative, too large or not a number")
        if encoding is Encoding.I8:
            codes = _view(source, np.int8, count, offset + 4 * groups)
        else:
            codes = _view(source, np.uint8, (count + 1) // 2, offset + 4 * groups)
    indices = None
    if head.flags & SPARSE:
        place = _view(data, np.uint8, index_bytes(count, head.size), at + head.stored)
        try:
            indices = positions.read(place, count, head.size)
        except ValueError as error:
            raise Malformed(str(error)) from None
    block = Block(head.start, head.size, encoding, codes, scales, indices)
    if scales is None and not _moderate(block.values):
        raise Malformed(f"a value is NaN or infinite, or beyond {VALUE_MAX:g}")
    return block


def _moderate(values: npt.NDArray[Any]) -> bool:
    """No NaN and nothing beyond VALUE_MAX: one pass without a temporary; a closer look only if its sum overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(float(np.dot(values, values))):
            return True
    return bool(np.max(np.abs(values)) <= VALUE_MAX)


def _view(data: Any, kind: type[Any], count: int, offset: int) -> npt.NDArray[Any]:
    """A view of ``data`` where it is aligned, else a copy."""
    array: npt.NDArray[Any] = np.frombuffer(data, kind, count, offset)
    return array if array.flags.aligned else array.copy()


def _unshrunk(frame: bytes | bytearray | memoryview, nbytes: int) -> bytes:
    """What a zstd frame holds, exactly ``nbytes``. A frame that declares another size, or none, is not opened."""
    try:
        declared = zstandard.frame_content_size(frame)
        if declared != nbytes:
            raise Malformed(f"zstd frame declares {declared} bytes where {nbytes} were expected")
        plain = _zstd.decompressor.decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Malformed(f"zstd: {error}") from None
    if len(plain) != nbytes:
        raise Malformed(f"zstd frame held {len(plain)} bytes where {nbytes} were expected")
    return plain


def encode_hello(hello: Hello) -> bytes:
    return _to_bytes(hello)


def decode_hello(data: bytes | bytearray | memoryview) -> Hello:
    """Raises Malformed."""
    if len(data) > HELLO_BYTES_MAX:
        raise Malformed(f"hello of {len(data)} bytes; at most {HELLO_BYTES_MAX}")
    try:
        hello = _to_hello(data)
    except _BAD_MSGPACK as error:
        raise Malformed(f"hello: {error}") from None
    numbers = (hello.protocol_min, hello.protocol_max, hello.incarnation, hello.of)
    if not all(0 <= n <= INT_MAX for n in (*numbers, *hello.cursors, *hello.cursors.values())):
        raise Malformed("hello: a number is negative or too large")
    return hello
