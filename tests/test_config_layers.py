"""Flags over environment over ./dlion.toml over the user's file over the job file, and the hashes of the result."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dlion.config import ConfigError, Job, config_hash, job_hash, load_job
from dlion.config.job import set_flag


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A directory with dlion.toml and an environment with a user's config.toml, a job and a variable."""
    (tmp_path / "home/dlion").mkdir(parents=True)
    (tmp_path / "job.toml").write_text("[job]\nseed = 1\n[train]\nbatch = 1\nmomentum = 0.1\neps = 0.1\nbetas = [0, 0]")
    (tmp_path / "home/dlion/config.toml").write_text("[job]\nseed = 2\n[train]\nbatch = 2\nmomentum = 0.2\neps = 0.2")
    (tmp_path / "dlion.toml").write_text("[job]\nseed = 3\n[train]\nbatch = 3\nmomentum = 0.3")
    return tmp_path, {
        "XDG_CONFIG_HOME": str(tmp_path / "home"),
        "DLION_TRAIN__BATCH": "4",
        "DLION_JOB__SEED": "4",
        "DLION_NO_SECTION": "ignored",
        "PATH": "ignored",
    }


def test_each_layer_overrules_those_below_it(places: tuple[Path, dict[str, str]]) -> None:
    directory, environ = places
    job = load_job(directory / "job.toml", {"job.seed": "5"}, environ, directory)
    assert (job.job.seed, job.train.batch, job.train.momentum, job.train.eps) == (5, 4, 0.3, 0.2)
    assert job.train.betas == (0.0, 0.0)
    assert job.train.learning_rate == Job().train.learning_rate


@pytest.mark.parametrize(
    ("flags", "variables", "where"),
    [
        ({"train.momentum": "x"}, {}, "flag train.momentum"),
        ({}, {"DLION_TRAIN__MOMENTUM": "x"}, "environment DLION_TRAIN__MOMENTUM"),
        ({}, {"DLION_TRAIN__MOMENTU": "0.5"}, "environment DLION_TRAIN__MOMENTU"),
        ({}, {"DLION_TRIAN__MOMENTUM": "0.5"}, "environment DLION_TRIAN__MOMENTUM"),
        ({}, {"DLION_TRAIN__BATCH__X": "1"}, "environment DLION_TRAIN__BATCH__X"),
    ],
)
def test_an_error_names_the_layer_that_made_it(
    places: tuple[Path, dict[str, str]], flags: dict[str, str], variables: dict[str, str], where: str
) -> None:
    directory, environ = places
    with pytest.raises(ConfigError) as caught:
        load_job(directory / "job.toml", flags, environ | variables, directory)
    assert caught.value.where == where


def test_text_means_what_its_key_expects() -> None:
    """A flag's text becomes a number, a list, a table or stays text, as the key's type says."""
    flags = {
        "job.name": "12",
        "job.until": "2m",
        "model.hidden": "[8, 4]",
        "train.nesterov": "true",
        "train.momentum": "0.9",
        "train.optimizer": "sgd",
        "exchange.settings.residual": "true",
        "exchange.settings.note": "plain words",
        "budget.wan_bytes_per_s": "1MB",
    }
    job = load_job("digits", flags, {})
    assert (job.job.name, job.job.until_s, job.model.hidden) == ("12", 120.0, (8, 4))
    assert (job.train.nesterov, job.train.momentum, job.budget.wan_bytes_per_s) == (True, 0.9, 1_000_000)
    assert job.exchange.settings == {"residual": True, "note": "plain words"}


def test_another_strategy_does_not_inherit_settings(tmp_path: Path) -> None:
    """Settings written for one strategy are left behind by a layer that names another."""
    path = tmp_path / "job.toml"
    path.write_text('[exchange]\nname = "dlion"\nsettings.min_n = 0.85\n')
    assert load_job(path, {"exchange.name": "dlion"}, {}, tmp_path).exchange.settings == {"min_n": 0.85}
    assert load_job(path, {"exchange.name": "full"}, {}, tmp_path).exchange.settings == {}
    flags = {"exchange.name": "full", "exchange.settings.x": "1"}
    assert load_job(path, flags, {}, tmp_path).exchange.settings == {"x": 1}


def test_set_flag_splits_and_refuses() -> None:
    assert set_flag("train.batch=4") == ("train.batch", "4")
    assert set_flag("exchange.settings.a=b=c") == ("exchange.settings.a", "b=c")
    for wrong in ("train.batch", "batch=4", "tran.batch=4"):
        with pytest.raises(ConfigError, match=r"section\.key=value"):
            set_flag(wrong)


def test_job_hash_covers_what_peers_must_agree_on_and_no_more() -> None:
    """Another batch is another job; another data directory, end or heartbeat is not."""
    job = load_job("digits", environ={})
    changed = [
        load_job("digits", {key: value}, {})
        for key, value in {"train.batch": 65, "job.seed": 1, "exchange.settings.a": 1, "model.hidden": "[4]"}.items()
    ]
    assert len({job_hash(j) for j in (job, *changed)}) == 5
    own = {"data.dir": "/elsewhere", "job.until": "9s", "job.name": "x", "node.heartbeat": "2s", "evaluate.every": 1}
    for key, value in own.items():
        other = load_job("digits", {key: value}, {})
        assert other != job and job_hash(other) == job_hash(job)
        assert config_hash(other) != config_hash(job)


def test_config_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1}) != config_hash({"a": 1, "b": [3]})
    assert len(config_hash(Job())) == 64
    assert msgspec.convert(msgspec.to_builtins(Job()), Job) == Job()
