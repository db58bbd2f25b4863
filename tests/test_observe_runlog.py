"""The run log: every event survives the way to disk and back, hashes mean something, damage is named."""

from __future__ import annotations

import errno
import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from observe_runs import SIX, peer_events, write_run

from dlion.cli.errors import CANNOT_WRITE, fault_of
from dlion.observe import runlog
from dlion.observe.read import DamagedLogError, PeerLog, columns, parse, read_directory

KINDS: tuple[type[runlog.Event], ...] = get_args(runlog.AnyEvent)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.builds(kind, **{f.name: values(f.type) for f in msgspec.structs.fields(kind)})
    if get_origin(kind) is not None or get_args(kind):
        return st.one_of([values(option) for option in get_args(kind)])
    return {
        bool: st.booleans(),
        int: st.integers(0, 2**53),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
        type(None): st.none(),
    }[kind]


def line(*events: runlog.Event) -> bytes:
    memory = runlog.Memory()
    log = runlog.RunLog(memory)
    for event in events:
        log.write(event)
    log.close()
    return memory.data


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_event_round_trips(kind: type[runlog.Event], data: st.DataObject) -> None:
    event = data.draw(values(kind))
    assert parse(line(event)) == [event]


def test_the_schema_document_names_every_event_and_field() -> None:
    text = (Path(__file__).parent.parent / "docs" / "runlog.md").read_text()
    for kind in KINDS:
        section = text.split(f"### {kind.__name__.lower()}\n")[1].split("\n### ")[0]
        for field in msgspec.structs.fields(kind):
            assert field.name == "t" or f"`{field.name}`" in section, (kind.__name__, field.name)


def test_lines_hold_no_wall_clock_and_round_times_to_microseconds() -> None:
    assert line(runlog.Lag(t=1.23456789, p99=0.5)) == b'{"e":"lag","t":1.234568,"p99":0.5}\n'


def test_numpy_scalars_and_losses_that_are_not_finite_can_be_written() -> None:
    step = runlog.Step(t=0.0, n=0, loss=np.float32("nan"), samples=np.int64(3), lr=0.1, seconds=0.1)  # type: ignore[arg-type]
    (read,) = parse(line(step))
    assert isinstance(read, runlog.Step)
    assert (read.loss, read.samples) == (None, 3)
    assert np.isnan(columns(runlog.Step, [read])["loss"][0])


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot write a object"):
        line(runlog.Lag(t=0.0, p99=object()))  # type: ignore[arg-type]


def test_the_digest_is_that_of_the_file_however_often_it_is_flushed(tmp_path: Path) -> None:
    digests = []
    for name, every in (("often", 1), ("seldom", 1000)):
        digest = runlog.Digest(runlog.File(tmp_path / f"{name}.jsonl"))
        log = runlog.RunLog(digest)
        for i, event in enumerate(peer_events("a1", SIX, 3.0)):
            log.write(event)
            if i % every == 0:
                log.flush()
        log.close()
        assert hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest() == digest.hexdigest
        digests.append(digest.hexdigest)
    assert digests[0] == digests[1]


def test_the_run_digest_depends_on_every_peer_but_not_on_their_order() -> None:
    one = {"a": "1", "b": "2"}
    assert runlog.run_digest(one) == runlog.run_digest({"b": "2", "a": "1"})
    assert runlog.run_digest(one) != runlog.run_digest({"a": "2", "b": "1"})


def test_pending_events_are_bounded_without_anybody_flushing() -> None:
    memory = runlog.Memory()
    log = runlog.RunLog(memory)
    for _ in range(runlog.PENDING_EVENTS_MAX):
        log.write(runlog.Lag(t=0.0, p99=0.0))
    assert memory.data.count(b"\n") == runlog.PENDING_EVENTS_MAX


def test_a_torn_last_line_is_dropped_at_any_place_of_the_tear() -> None:
    events = list(peer_events("a1", SIX, 0.3))[:5]
    data = line(*events)
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(data) - 1):
        assert parse(data[:cut]) == events[:-1]
    assert parse(data[:-1]) == events


def test_damage_elsewhere_names_file_and_line(tmp_path: Path) -> None:
    write_run(tmp_path, ["a1"], 2.0)
    path = tmp_path / "a1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"e":"step"}\n', *lines[4:]]))
    with pytest.raises(DamagedLogError, match=r"a1\.jsonl, line 4: .*missing required field"):
        read_directory(tmp_path)


def test_directories_without_logs_and_logs_without_header_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedLogError, match="no run log"):
        read_directory(tmp_path)
    (tmp_path / "league.html").touch()
    with pytest.raises(DamagedLogError, match="results of dlion compare"):
        read_directory(tmp_path)
    (tmp_path / "league.html").unlink()
    (tmp_path / "x.jsonl").write_bytes(line(runlog.Lag(t=0.0, p99=0.0)))
    with pytest.raises(DamagedLogError, match="expected a header"):
        read_directory(tmp_path)


def test_a_later_format_is_refused() -> None:
    header = next(peer_events("a1", SIX, 0.1))
    with pytest.raises(DamagedLogError, match="format 2"):
        PeerLog.of([msgspec.structs.replace(header, format=2)])


def test_a_directory_reads_into_columns_lives_in_order_and_evaluations_from_beside(tmp_path: Path) -> None:
    write_run(tmp_path, ["a1", "b1"], 3.0)
    second = runlog.next_log_path(tmp_path, "a1")
    assert second.name == "a1.2.jsonl"
    events = list(peer_events("a1", ["a1", "b1"], 3.0))
    second.write_bytes(line(*events))
    (tmp_path / "a1.eval.jsonl").write_bytes(line(runlog.Eval(t=9.0, step=1, accuracy=0.5, loss=None, samples=1)))
    runlog.write_host(tmp_path, "a1", {"hostname": "somewhere", "started": 12.5})
    run = read_directory(tmp_path)
    assert list(run.peers) == ["a1", "b1"]
    steps = run.peers["a1"][runlog.Step]
    once = sum(isinstance(e, runlog.Step) for e in events)
    assert steps["n"].tolist() == [*range(once), *range(once)]
    assert steps["waited.pace"].dtype == np.float64
    assert run.peers["a1"][runlog.Eval]["accuracy"][-1] == 0.5
    assert run.peers["a1"].host == {"hostname": "somewhere", "started": 12.5}
    assert run.peers["b1"][runlog.Refuse]["reason"].size == 0
    assert run.seconds == 9.0
    assert set(run.peers["a1"].links()) == {"b1"}


def test_a_log_in_memory_is_packed_and_whole() -> None:
    memory = runlog.Memory()
    lines = [line(runlog.Batch(t=float(n), size=n, global_size=8 * n)) for n in range(12_000)]
    for each in lines:
        memory.write(each)
    assert memory.data == b"".join(lines) and len(memory.data) > 2 * runlog.PACKED_BYTES
    assert sum(map(len, memory._packed)) + len(memory._open) < len(memory.data) // 3


def test_a_full_disk_is_said_with_the_path() -> None:
    """Linux has a file that is always full."""
    with (
        closing(runlog.File(Path("/dev/full"))) as file,
        pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught,
    ):
        file.write(b"{}\n")
    fault = fault_of(caught.value)
    assert fault is not None and (fault.code, fault.where) == (CANNOT_WRITE, "/dev/full")
    nowhere = fault_of(OSError(errno.ENOSPC, "No space left on device"))
    assert nowhere is not None and nowhere.code == CANNOT_WRITE
