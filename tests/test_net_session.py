"""Two sessions back to back, without loop or socket: exactly once, in order, within bounds, whatever the links do."""

from __future__ import annotations

import dataclasses
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlion.net.chunks import ACK, BYE, DATA, HEADER, LENGTH, PING, PONG, Bye, ProtocolError
from dlion.net.session import Session, SessionFullError, SessionLimits

CONTROL, UPDATE, BULK = 0, 1, 2
SMALL = SessionLimits(
    message_bytes_max=50_000,
    control_message_bytes_max=1_000,
    queued_bytes_max=2_000_000,
    unacked_bytes_max=4_000,
    window_bytes_initial=4_000,
    chunk_bytes_min=512,
    chunk_bytes_max=2_048,
    ack_bytes_min=0,
)
Said = list[tuple[int, int, bytes]]


def deliver(to: Session, data: bytes, now: float) -> Said:
    """Give ``to`` these bytes as a link would."""
    view, heard = memoryview(data), []
    while view.nbytes:
        place = to.get_buffer(view.nbytes)
        assert place.nbytes > 0
        taken = min(place.nbytes, view.nbytes)
        place[:taken] = view[:taken]
        view = view[taken:]
        heard += [(stream, seq, bytes(body)) for stream, seq, body in to.buffer_updated(taken, now)]
    return heard


def drain(of: Session, now: float) -> bytes:
    """Everything that may leave now."""
    data = b""
    while buffers := of.outgoing(now):
        data += b"".join(buffers)
    return data


def exchange(a: Session, b: Session, now: float = 0.0, rounds: int = 1_000) -> tuple[Said, Said]:
    """Carry bytes both ways until both are idle; what a heard, what b heard."""
    at_a: Said = []
    at_b: Said = []
    for turn in range(rounds):
        later = now + turn * 0.05
        at_b += deliver(b, drain(a, later), later)
        at_a += deliver(a, drain(b, later), later)
        if a.idle and b.idle:
            return at_a, at_b
    raise AssertionError("they never come to rest")


def pair(limits: SessionLimits = SMALL) -> tuple[Session, Session]:
    a, b = Session(limits, 0.0), Session(limits, 0.0)
    a.resume({}, 0.0)
    b.resume({}, 0.0)
    return a, b


def by_stream(said: Said) -> list[Said]:
    return [[one for one in said if one[0] == stream] for stream in range(3)]


messages = st.lists(
    st.tuples(st.sampled_from([CONTROL, UPDATE, BULK]), st.integers(0, 900) | st.integers(0, 20_000)), max_size=25
)


@given(messages, messages, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_every_message_arrives_once_and_in_order_though_links_are_cut_anywhere(
    to_b: list[tuple[int, int]], to_a: list[tuple[int, int]], rng: random.Random
) -> None:
    """Links are cut at random bytes of each direction; cursors may be stale by what the old link still delivers."""
    a, b = pair()
    said: tuple[Said, Said] = ([], [])
    for sender, plan, log in ((a, to_b, said[0]), (b, to_a, said[1])):
        for wanted, size in plan:
            stream = wanted if size <= SMALL.control_message_bytes_max else max(wanted, UPDATE)
            body = rng.randbytes(size)
            log.append((stream, sender.send(stream, body, 0.0), body))
    at_a: Said = []
    at_b: Said = []
    now = 0.0
    for _ in range(rng.randrange(6)):
        for _ in range(rng.randrange(4)):
            now += 0.01
            at_b += deliver(b, drain(a, now), now)
            at_a += deliver(a, drain(b, now), now)
            for end in (a, b):
                assert end.unacked_bytes <= SMALL.unacked_bytes_max
        now += 0.01
        cursors_a, cursors_b = a.cursors(), b.cursors()
        late_a, late_b = drain(b, now), drain(a, now)
        at_a += deliver(a, late_a[: rng.randrange(len(late_a) + 1)], now)
        at_b += deliver(b, late_b[: rng.randrange(len(late_b) + 1)], now)
        if rng.random() < 0.7:
            cursors_a, cursors_b = a.cursors(), b.cursors()
        a.resume(cursors_b, now)
        b.resume(cursors_a, now)
    last_a, last_b = exchange(a, b, now)
    assert by_stream(at_b + last_b) == by_stream(said[0])
    assert by_stream(at_a + last_a) == by_stream(said[1])
    assert a.queued_bytes == b.queued_bytes == a.unacked_bytes == 0
    assert [a.acked(stream) for stream in range(3)] == [a.sent(stream) for stream in range(3)]
    assert [b.received(stream) for stream in range(3)] == [a.sent(stream) for stream in range(3)]
    assert a.cursors()[UPDATE] == sum(len(body) + 4 for stream, _, body in said[1] if stream == UPDATE)


def frame(kind: int, stream: int, value: int, offset: int, payload: bytes = b"") -> bytes:
    return struct.pack("<BBHIQ", kind, stream, 0, value, offset) + payload


hostile = st.lists(
    st.binary(max_size=80)
    | st.builds(
        frame,
        st.integers(0, 6),
        st.integers(0, 3),
        st.integers(0, 40) | st.integers(0, 2**32 - 1),
        st.integers(0, 40) | st.integers(0, 2**64 - 1),
        st.binary(max_size=40),
    )
    | st.builds(
        lambda stream, body, lie: frame(DATA, stream, len(body) + 4, 0, LENGTH.pack(max(0, len(body) + lie)) + body),
        st.integers(0, 2),
        st.binary(max_size=40),
        st.integers(-40, 40),
    ),
    max_size=12,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_hostile_bytes_cause_protocol_errors_and_nothing_else(data: st.DataObject) -> None:
    """Whatever arrives, and whatever leaves and resumes afterwards."""
    a, _ = pair()
    for size in (10, 3_000, 100):
        a.send(UPDATE, bytes(size), 0.0)
    drain(a, 0.0)
    for now, part in enumerate(data.draw(hostile)):
        try:
            deliver(a, part, float(now))
        except ProtocolError as error:
            assert str(error)
            break
    drain(a, 100.0)
    with_lies = data.draw(st.dictionaries(st.integers(0, 2), st.integers(0, 4_000)))
    try:
        a.resume(with_lies, 101.0)
    except ProtocolError:
        return
    drain(a, 102.0)
    assert a.unacked_bytes <= SMALL.unacked_bytes_max


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame(9, 0, 0, 0), "unknown frame"),
        (frame(DATA, 3, 8, 0), "unknown frame"),
        (struct.pack("<BBHIQ", DATA, 1, 7, 8, 0), "unknown frame"),
        (frame(DATA, UPDATE, 8, 100), "gap"),
        (frame(DATA, UPDATE, 0, 0), "chunk of 0 bytes"),
        (frame(DATA, UPDATE, 60_000, 0), "chunk of 60000 bytes"),
        (frame(DATA, UPDATE, 3, 0, b"abc"), "inside a length"),
        (frame(DATA, UPDATE, 8, 0, LENGTH.pack(3) + b"abcd"), "crosses the end"),
        (frame(DATA, UPDATE, 8, 0, LENGTH.pack(50_001) + b"abcd"), "message of 50001 bytes"),
        (frame(DATA, CONTROL, 8, 0, LENGTH.pack(1_001) + b"abcd"), "message of 1001 bytes"),
        (frame(ACK, UPDATE, 0, 1), "acknowledged"),
    ],
)
def test_each_fault_of_framing_is_named(data: bytes, reason: str) -> None:
    """Also when it arrives byte by byte."""
    with pytest.raises(ProtocolError, match=reason):
        deliver(pair()[0], data, 0.0)
    a, _ = pair()
    with pytest.raises(ProtocolError, match=reason):
        for one in data:
            deliver(a, bytes([one]), 0.0)


def test_a_chunk_that_overruns_a_half_received_message_is_refused() -> None:
    a, _ = pair()
    deliver(a, frame(DATA, UPDATE, 6, 0, LENGTH.pack(4) + b"ab"), 0.0)
    with pytest.raises(ProtocolError, match="crosses the end"):
        deliver(a, frame(DATA, UPDATE, 3, 6), 0.0)


def test_a_peer_cannot_claim_what_was_never_sent_nor_take_back_what_it_acknowledged() -> None:
    a, b = pair()
    a.send(UPDATE, b"hello", 0.0)
    with pytest.raises(ProtocolError, match="cursor 9 of stream 1 is not in 0 to 0"):
        a.resume({UPDATE: 9}, 0.0)
    exchange(a, b)
    with pytest.raises(ProtocolError, match="cursor 0 of stream 1 is not in 9 to 9"):
        a.resume({}, 1.0)


def test_a_message_completed_before_a_fault_is_not_lost() -> None:
    """Its bytes count as received, so it would never be sent again."""
    a, b = pair()
    b.send(UPDATE, b"kept", 0.0)
    data = drain(b, 0.0) + frame(9, 0, 0, 0)
    place = a.get_buffer(len(data))
    place[: len(data)] = data
    with pytest.raises(ProtocolError):
        a.buffer_updated(len(data), 0.0)
    assert [bytes(body) for _, _, body in a.take_messages()] == [b"kept"]
    assert a.cursors()[UPDATE] == 8


def test_control_overtakes_and_updates_go_before_bulk() -> None:
    """Between chunks: a message queued late on a lower stream leaves before the rest of a long one."""
    a, _ = pair()
    a.send(BULK, bytes(20_000), 0.0)
    a.send(UPDATE, bytes(1_000), 0.0)
    first = b"".join(a.outgoing(0.0))
    a.send(CONTROL, b"now", 0.0)
    rest = drain(a, 0.0)
    assert HEADER.unpack_from(first)[:2] == (DATA, UPDATE)
    assert HEADER.unpack_from(rest)[:2] == (DATA, CONTROL)
    assert a.writable_bytes() == 0
    before = a.unacked_bytes
    a.send(CONTROL, b"though the window is full", 0.0)
    assert drain(a, 0.0)
    assert a.unacked_bytes == before


def test_queues_and_messages_are_bounded() -> None:
    a, _ = pair()
    with pytest.raises(ValueError, match="too long"):
        a.send(UPDATE, bytes(50_001), 0.0)
    with pytest.raises(ValueError, match="too long"):
        a.send(CONTROL, bytes(1_001), 0.0)
    with pytest.raises(SessionFullError):
        for _ in range(100):
            a.send(UPDATE, bytes(40_000), 0.0)
    assert a.queued_bytes <= SMALL.queued_bytes_max
    with pytest.raises(ValueError, match="chunk_bytes_min"):
        SessionLimits(unacked_bytes_max=100)


def test_large_payloads_are_read_straight_into_their_message() -> None:
    """The place offered to the link is the delivered body itself."""
    a, _ = pair(SessionLimits())
    body = bytes(range(256)) * 1024
    deliver(a, frame(DATA, UPDATE, len(body) + 4, 0, LENGTH.pack(len(body))), 0.0)
    place = a.get_buffer(-1)
    assert place.nbytes == len(body)
    place[:2] = b"!!"
    a.buffer_updated(2, 0.0)
    assert a.get_buffer(-1).nbytes == len(body) - 2
    a.buffer_updated(0, 0.0)
    assert deliver(a, body[2:] + frame(PING, 0, 0, 1), 0.0) == [(UPDATE, 1, b"!!" + body[2:])]


def test_acknowledgements_ride_along_or_leave_in_time() -> None:
    a, b = pair()
    drain(a, 0.0)
    drain(b, 0.0)
    a.send(UPDATE, b"x", 0.0)
    deliver(b, drain(a, 0.0), 0.0)
    assert b.outgoing(0.001) == []
    assert 0.001 < b.ack_at <= 0.02
    b.send(UPDATE, b"y", 0.001)
    deliver(a, drain(b, 0.001), 0.001)
    assert a.idle
    due = a.ack_at
    assert HEADER.unpack(drain(a, due)) == (ACK, UPDATE, round((due - 0.001) * 1e4), 1_000, 5)


def test_little_is_acknowledged_by_a_sign_of_life_and_much_in_time() -> None:
    a, b = pair(dataclasses.replace(SMALL, ack_bytes_min=512))
    drain(a, 0.0)
    drain(b, 0.0)
    a.send(UPDATE, b"x", 0.0)
    deliver(b, drain(a, 0.0), 0.0)
    assert b.ack_at == float("inf") and drain(b, 9.0) == b"", "it waits for something to ride on"
    b.sign(9.0)
    assert deliver(a, drain(b, 9.0), 9.0) == [] and a.idle, "and is a sign of life itself"
    b.sign(10.0)
    assert HEADER.unpack(drain(b, 10.0))[0] == PING, "with nothing to acknowledge, only a PING is one"
    a.send(UPDATE, bytes(600), 11.0)
    deliver(b, drain(a, 11.0), 11.0)
    assert 11.0 < b.ack_at <= 11.02


def test_a_ping_comes_back_and_goodbye_is_heard() -> None:
    a, b = pair()
    deliver(b, drain(a, 1.0), 1.0)
    deliver(a, drain(b, 1.03), 1.03)
    assert a.estimate.distance_s == pytest.approx(0.03)
    deliver(a, frame(PONG, 0, 0, 5), 2.0)
    assert a.estimate.distance_s == pytest.approx(0.03), "a PONG nobody asked for says nothing"
    deliver(a, frame(PING, 0, 0, 77), 2.0)
    assert drain(a, 2.0) == frame(PONG, 0, 0, 77)
    deliver(a, b.bye(Bye.LEAVING), 2.0)
    assert a.peer_bye is Bye.LEAVING
    deliver(a, frame(BYE, 0, 99, 0), 2.0)
    assert a.peer_bye == 99
