"""Names and paths, units, and the one error that every mistake in a file becomes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.config import ConfigError, find, known, load_job, load_peer, load_setup, load_topology
from dlion.config.units import bits_per_s, seconds, size_bytes


def job_error(tmp_path: Path, text: str) -> ConfigError:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_job(path, environ={}, directory=tmp_path)
    assert caught.value.where == str(path)
    return caught.value


# -- finding ------------------------------------------------------------------------------------------------------


def test_everything_packaged_is_found_and_reads() -> None:
    """The names that users are promised exist, and no packaged file is wrong."""
    assert {"digits", "fashion-mnist", "mnist", "toy", "fashion-cnn", "shakespeare-gpt"} <= set(known("job"))
    assert {"homogeneous", "hetero-compute", "hetero-network", "hetero-system", "hetero-system-5", "demo"} <= set(
        known("topology")
    )
    assert {"hetero-system-egress", "dynamic-system", "four-clouds"} <= set(known("topology"))
    assert {"a1", "a2", "b1", "b2", "c1", "c2"} <= set(known("peer"))
    for name in known("job"):
        assert load_job(name, environ={}).job.name == name
    for name in known("topology"):
        assert load_topology(name).name == name
    for name in known("peer"):
        assert load_setup(name, environ={}).peer == load_peer(name)


def test_a_path_wins_over_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the current directory that is called like a packaged job is the one that is read."""
    monkeypatch.chdir(tmp_path)
    assert find("job", "digits").path == known("job")["digits"]
    (tmp_path / "digits").write_text("[job]\nseed = 7\n")
    assert load_job("digits", environ={}).job.seed == 7


@pytest.mark.parametrize("kind", ["job", "topology", "peer"])
def test_an_unknown_name_lists_the_known_ones(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(kind, "nonesuch")  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in known(kind))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no such"):
        find(kind, "./nonesuch.toml")  # type: ignore[arg-type]


# -- units --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [(90, 90), ("90", 90), ("90s", 90), ("5m", 300), ("2h", 7200), ("0.2ms", 2e-4), ("1 d", 86400), (0.5, 0.5)],
)
def test_durations(text: object, value: float) -> None:
    assert seconds(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("text", "value"), [("50Mbit", 5e7), ("1Gbit", 1e9), (5e6, 5e6), ("2.5 Mbit/s", 2.5e6)])
def test_rates(text: object, value: float) -> None:
    assert bits_per_s(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("64MiB", 64 << 20), ("64kB", 64000), ("1KiB", 1024), ("1kiB", 1024), ("1.5GiB", 3 << 29)]
)
def test_sizes(text: object, value: int) -> None:
    assert size_bytes(text) == value


@given(st.text() | st.booleans() | st.none() | st.lists(st.integers()))
def test_anything_else_is_refused(raw: object) -> None:
    """A unit parser returns a number or raises ValueError (OverflowError for a size beyond all), nothing else."""
    for parse in (seconds, bits_per_s, size_bytes):
        with contextlib.suppress(ValueError, OverflowError):
            assert isinstance(parse(raw), float | int)


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("[train]\nlearning_rat = 1", "train.learning_rat", 'Did you mean "learning_rate"?'),
        ("[tran]\nbatch = 1", "tran", 'Did you mean "train"?'),
        ("[train]\nlearning_rate = 'fast'", "train.learning_rate", 'found "fast"; expected float'),
        ("[train]\nlearning_rate = 0", "train.learning_rate", "expected float > 0"),
        ("[train]\nlearning_rate = inf", "train.learning_rate", "expected a finite number"),
        ("[train]\nlearning_rate = true", "train.learning_rate", "found true"),
        ("[train]\nbatch = -3", "train.batch", "found -3; expected int >= 1"),
        ("[train]\noptimizer = 'adam'", "train.optimizer", 'one of sgd, adamw. Did you mean "adamw"?'),
        ("[train]\nbetas = [0.9]", "train.betas", "found [0.9]"),
        ("[train]\nnesterov = true", "train.nesterov", "momentum above 0"),
        ("[train]\nschedule = 'cosine'", "train.decay_samples", "above 0 for the cosine schedule"),
        ("[model]\nhidden = [5, 0]", "model.hidden[1]", "found 0"),
        ("[model]\nhidden = 512", "model.hidden", "expected a list"),
        ("[job]\nuntil = 'soon'", "job.until", "expected a duration"),
        ("[job]\nuntil = -1", "job.until", "found -1"),
        ("[job]\nuntil = '0s'", "job.until", "expected float > 0"),
        ("[job]\nworkload = 'module:'", "job.workload", "module:factory"),
        ("[node]\nunacked_bytes_max = '64 lemons'", "node.unacked_bytes_max", "expected a size"),
        ("[node]\nsuspect_after = '1s'", "node.suspect_after", "above heartbeat"),
        ("[node]\ndial_backoff_min = '1m'", "node.dial_backoff_min", "at most 5.0"),
        ("[evaluate]\ntargets = [80]", "evaluate.targets[0]", "expected float <= 1"),
        ("train = 3", "train", "found 3; expected a table"),
        ("[train", "", "not valid TOML"),
    ],
)
def test_every_mistake_is_one_error_with_file_key_and_expectation(
    tmp_path: Path, text: str, key: str, words: str
) -> None:
    error = job_error(tmp_path, text)
    assert error.key == key
    assert words in str(error) and "\n" not in str(error).strip()


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_job(path)
    path.write_bytes(b"#" * (5 << 20))
    with pytest.raises(ConfigError, match="too large"):
        load_job(path)


# -- peers --------------------------------------------------------------------------------------------------------

PEER = 'name = "a1"\ntopology = "demo"\njob = "digits"\n'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (PEER.replace("a1", "a9"), "name"),
        (PEER + 'cloud = "b"', "cloud"),
        (PEER + 'listen = "7001"', "listen"),
        (PEER + 'listen = "::1:7001"', "listen"),
        (PEER + 'listen = "localhost:99999"', "listen"),
        (PEER + "data_share = 0", "data_share"),
        (PEER + "data_share = 1.5", "data_share"),
        (PEER + '[peers]\nz1 = "host:1"', "peers.z1"),
        (PEER + '[peers]\nb1 = "host"', "peers.b1"),
        (PEER.replace("demo", "hetero-system"), "peers.a2"),
        ('name = "a1"\ntopology = "demo"\n', "job"),
    ],
)
def test_a_peer_file_is_checked_against_its_topology(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "peer.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_setup(path, environ={})
    assert (caught.value.where, caught.value.key) == (str(path), key)


def test_the_peer_file_overrules_the_topology(tmp_path: Path) -> None:
    """Addresses and speed of the peer file win; an empty address means that one dials us; paths lie beside it."""
    (tmp_path / "mine.toml").write_text("[job]\nseed = 3\n")
    path = tmp_path / "peer.toml"
    path.write_text(
        PEER.replace('"digits"', '"mine.toml"') + 'speed = 80\nlisten = "[::1]:7001"\n[peers]\nb1 = "b:1"\nc1 = ""'
    )
    setup = load_setup(path, {"job.until": "9s"}, environ={})
    assert setup.speed is not None and setup.speed.seconds(64, 0.0) == pytest.approx(0.8)
    assert setup.addresses["b1"] == "b:1" and setup.addresses["b2"] == "127.0.0.1:7202"  # type: ignore[index]
    assert "c1" not in setup.addresses and "a1" not in setup.addresses
    assert (setup.job.job.seed, setup.job.job.until_s, setup.job.job.name) == (3, 9.0, "mine")


def test_speed_zero_means_the_machine_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "peer.toml"
    path.write_text(PEER + "speed = 0\n")
    assert load_setup(path, environ={}).speed is None
