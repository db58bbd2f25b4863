"""The roster: one rule of liveness; news that supersede; silence that is told, and doubted; texts that are no news."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.mesh.roster import FEW, Record, Roster, State, news_texts, records_of
from dlion.messages import PeerId

A, B, C, D = (PeerId(p) for p in "abcd")
SILENT_AFTER_S = 5.0


def roster(me: PeerId = A) -> Roster:
    made = Roster(Record(me, 1), (A, B, C, D), SILENT_AFTER_S)
    made.presume(0.0)
    return made


def beat(peer: PeerId, number: int, **changes: object) -> Record:
    return msgspec.structs.replace(Record(peer, 1, number), **changes)


def test_who_is_expected_counts_from_the_start_but_not_for_ever() -> None:
    ours = Roster(Record(A, 1), (B, C), SILENT_AFTER_S)
    assert ours.live == (A,)
    changes = [*ours.miss([C], 0.0), *ours.presume(0.0)]
    assert {c.peer: c.state for c in changes} == {B: State.LIVE, C: State.SILENT} and ours.live == (A, B)
    assert ours.age(SILENT_AFTER_S) == []
    assert [c.peer for c in ours.age(SILENT_AFTER_S + 0.1)] == [B]
    assert ours.live == (A,)


def test_news_keep_a_peer_alive_whoever_brings_them_and_old_news_do_not() -> None:
    ours = roster()
    assert ours.hear(beat(B, 1), C, 4.0) is None
    assert ours.hear(beat(B, 1), D, 8.0) is None, "the same beat again proves nothing"
    assert {c.peer for c in ours.age(9.5)} == {B, C, D}
    heard = ours.hear(beat(B, 2), C, 10.0)
    assert heard is not None and (heard.state, heard.why) == (State.LIVE, "heard again")


def test_our_own_lateness_is_not_their_silence() -> None:
    ours = roster()
    assert ours.age(7.0, lag_s=3.0) == []
    assert len(ours.age(7.0)) == 3


def test_a_lost_link_shortens_patience_and_news_restore_it() -> None:
    ours = roster()
    ours.hear(beat(B, 1), B, 10.0)
    ours.hear(beat(C, 1), C, 10.0)
    ours.hear(beat(D, 1), D, 10.0)
    ours.lost(B, 10.0, patience_s=2.0)
    assert ours.age(11.9) == []
    ours.hear(beat(B, 2), C, 11.9)
    assert ours.age(14.0) == [], "it lives, says another"
    for peer in (C, D):
        ours.hear(beat(peer, 2), peer, 14.0)
    ours.lost(B, 14.0, patience_s=2.0)
    assert [c.peer for c in ours.age(16.1)] == [B]


def test_found_silence_is_told_to_the_others_who_may_know_better() -> None:
    finder, believer, doubter = roster(A), roster(C), roster(D)
    for each in (finder, believer, doubter):
        each.hear(beat(B, 7), B, 1.0)
    doubter.hear(beat(B, 8), B, 2.0)
    for peer in (C, D):
        finder.hear(beat(peer, 9), peer, 5.0)
    assert [c.peer for c in finder.age(6.5)] == [B]
    (news,) = [r for r in finder.news_for(C, lambda peer, teller: True) if r.peer == B]
    assert news.silent and news.beat == 7
    found = believer.hear(news, A, 3.0)
    assert found is not None and found.state is State.SILENT and B not in believer.live
    assert doubter.hear(news, A, 3.0) is None and B in doubter.live
    assert believer.hear(news, D, 3.5) is None, "once is enough"
    revived = believer.hear(beat(B, 8), D, 4.0)
    assert revived is not None and revived.state is State.LIVE


def test_a_rumour_never_touches_ourselves_or_who_has_left() -> None:
    ours = roster()
    assert ours.hear(beat(A, 99, silent=True), B, 1.0) is None and A in ours.live
    assert ours.finished(B, leaving=True) is not None
    assert ours.hear(beat(B, 5, silent=True), C, 1.0) is None and ours.states[B] is State.LEFT
    assert ours.hear(beat(B, 6), C, 1.0) is None and ours.states[B] is State.LEFT, "gone until a new life"


def test_last_words() -> None:
    ours = roster()
    finished = ours.finished(B, leaving=False)
    assert finished is not None and finished.state is State.FINISHED and B in ours.live
    assert ours.finished(B, leaving=False) is None
    left = ours.finished(B, leaving=True)
    assert left is not None and left.state is State.LEFT and B not in ours.live
    assert ours.finished(PeerId("nobody"), leaving=True) is None


def test_news_are_told_once_to_each_and_never_back_to_who_told_them() -> None:
    ours = roster()
    everything = lambda peer, teller: True  # noqa: E731
    ours.speak(step=4)
    ours.hear(beat(B, 1), C, 0.5)
    assert {r.peer for r in ours.news_for(D, everything)} == {A, B}
    assert ours.news_for(D, everything) == []
    assert {r.peer for r in ours.news_for(C, everything)} == {A}
    assert {r.peer for r in ours.news_for(B, everything)} == {A}
    ours.speak(step=5)
    assert [(r.peer, r.step) for r in ours.news_for(D, everything)] == [(A, 5)]


RECORDS = st.builds(
    Record,
    peer=st.sampled_from([A, B, C, D, PeerId("stranger")]),
    incarnation=st.integers(0, 3),
    beat=st.integers(0, 6),
    silent=st.booleans(),
)


@given(st.lists(st.tuples(RECORDS, st.sampled_from([B, C, D]), st.floats(0, 60)), max_size=30))
def test_whatever_is_told_the_roster_knows_no_strangers_and_never_goes_back(
    told: list[tuple[Record, PeerId, float]],
) -> None:
    ours = roster()
    for record, teller, now in told:
        before = {p: r.stamp for p, r in ours.records.items()}
        ours.hear(record, teller, now)
        assert set(ours.records) == {A, B, C, D} and A in ours.live
        assert all(r.stamp[:2] >= before[p][:2] for p, r in ours.records.items())


@given(st.lists(RECORDS, max_size=600))
def test_news_travel_as_text(records: list[Record]) -> None:
    assert [r for text in news_texts(records) for r in records_of(text)] == records


def test_numbers_of_numpy_are_numbers_and_nothing_else_is_told() -> None:
    ours = roster()
    ours.speak(samples_per_s=np.float64(1.5), batch=np.int64(8), loss=np.float32(0.25))
    assert records_of(news_texts([ours.me])[0]) == [Record(A, 1, 1, samples_per_s=1.5, batch=8, loss=0.25)]
    with pytest.raises(TypeError, match="expected a number"):
        news_texts([Record(A, loss=object())])  # type: ignore[arg-type]


def test_who_falls_silent_while_we_wait_for_it_is_silent() -> None:
    ours = Roster(Record(A, 1), (A, B, C), SILENT_AFTER_S)
    change = ours.hear(Record(B, 7, 2, silent=True), C, 1.0)
    assert change is not None and change.state is State.SILENT and ours.states[C] is State.EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[[]]",
        '[["b",-1]]',
        '[["b",0,0,0,0,-1.0]]',
        '[["b",1.5]]',
        "[" * 5000,
        '[["b",0,0,0,0,0,0,0,false,0,1]]',
    ],
)
def test_a_text_that_is_no_news_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        records_of(text)


def test_of_many_each_speaks_rarely_but_at_once_when_its_power_changes() -> None:
    many = [PeerId(f"p{n:02d}") for n in range(FEW + 12)]
    ours = Roster(Record(many[0], 1), many, SILENT_AFTER_S)
    assert ours.beat_s == 12.0 and roster().beat_s == 1.0
    spoke = []
    for t in range(30):
        before = ours.me.beat
        ours.beat(float(t), step=t, samples_per_s=10.0 if t < 20 else 10.2 if t < 25 else 12.0)
        spoke += [t] * (ours.me.beat > before)
    assert spoke == [0, 12, 24, 25]


def test_of_many_the_near_are_missed_soon_and_the_far_later() -> None:
    many = [PeerId(f"p{n:02d}") for n in range(FEW + 12)]
    near, far = many[1:3]
    ours = Roster(Record(many[0], 1), many, SILENT_AFTER_S)
    ours.presume(0.0)
    assert ours.near(near, 0.0) is None
    assert [c.peer for c in ours.age(SILENT_AFTER_S + 0.1)] == [near]
    back = ours.near(near, 9.0)
    assert back is not None and back.state is State.LIVE, "bytes are news"
    assert far not in {c.peer for c in ours.age(SILENT_AFTER_S + 2 * 11.0)}
    assert far in {c.peer for c in ours.age(SILENT_AFTER_S + 2 * 11.0 + 0.1)}


def test_a_rumour_is_doubted_by_who_hears_the_peer_and_refuted_by_the_peer_itself() -> None:
    doubter, victim = roster(A), roster(B)
    doubter.hear(beat(B, 7), B, 1.0)
    doubter.near(B, 2.0)
    rumour = beat(B, 7, silent=True)
    assert doubter.hear(rumour, C, 3.0) is None and B in doubter.live and doubter.hears(B, 3.0)
    victim.me = victim.records[B] = beat(B, 7)
    victim.beat(0.0, samples_per_s=0.0)
    spoken = victim.me.beat
    victim.beat(0.5, samples_per_s=0.0)
    assert victim.me.beat == spoken, "nothing is due"
    assert victim.hear(beat(B, spoken, silent=True), A, 0.6) is None
    victim.beat(0.7, samples_per_s=0.0)
    assert victim.me.beat == spoken + 1
    assert not doubter.hears(B, 2.0 + SILENT_AFTER_S + 0.1), "for a while only"


def test_samples_of_all_are_counted_as_they_are_heard() -> None:
    ours = roster()
    ours.hear(beat(B, 1, samples=100), B, 0.0)
    ours.hear(beat(C, 1, samples=10), B, 0.0)
    ours.hear(beat(B, 2, samples=150), B, 0.0)
    ours.speak(samples=5)
    ours.alive(C, 2, 1.0)
    assert ours.samples == sum(r.samples for r in ours.records.values()) == 165


def test_of_many_a_batch_that_differs_by_little_waits_for_the_next_beat() -> None:
    many = [PeerId(f"p{n:02d}") for n in range(FEW + 12)]
    ours, few = Roster(Record(many[0], 1), many, SILENT_AFTER_S), roster()
    told = []
    for batch in (64, 65, 63, 70):
        before = ours.me.beat
        ours.deal(batch)
        few.deal(batch)
        told += [batch] * (ours.me.beat > before)
        assert ours.records[many[0]].batch == batch, "those we speak to anyway hear the newest"
    assert told == [64, 70] and few.me.beat == 4


def test_news_for_those_who_are_told_alike_are_gathered_once() -> None:
    ours, asked = roster(), []
    ours.speak(step=1)
    ours.hear(beat(B, 1), B, 0.0)

    def carried(peer: PeerId, teller: PeerId) -> bool:
        asked.append(peer)
        return True

    first, second, apart = (ours.news_for(C, carried, "x"), ours.news_for(D, carried, "x"), ours.news_for(B, carried))
    assert first is second and [r.peer for r in first] == [B, A] and asked == [B]
    assert [r.peer for r in apart] == [A], "B knows what it told us"
    assert ours.news_for(C, carried, "x") == []


def test_texts_of_news_are_as_long_as_a_field_may_be() -> None:
    records = [Record(PeerId(f"c{n:03d}p00"), 1, n, n, 64 * n, 12.8, 64, 0.123456789) for n in range(1000)]
    texts = news_texts(records)
    assert max(map(len, texts)) <= 4096 and len(texts) <= 20
    assert records_of(texts[0]) is records_of(texts[0]), "mates hold the same records"
