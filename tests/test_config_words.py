"""What is wrong with a job is said once: the file, flag or variable; the key; what was found and what is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlion import cli
from dlion.config import ConfigError, flag_origins, origin_of

NAMES = "expected one of ako, choco,"


@pytest.mark.parametrize(
    ("where", "key", "place"),
    [
        ("job.toml", "train.x", "job.toml: train.x: "),
        ("job.toml", "", "job.toml: "),
        ("flag train.x", "train.x", "flag train.x: "),
        ("flag train.betas", "train.betas[0]", "flag train.betas[0]: "),
        ("flag train.x", "train", "flag train.x: train: "),
        ("environment DLION_TRAIN__X", "train.x", "environment DLION_TRAIN__X: "),
        ("environment DLION_TRIAN__X", "trian", "environment DLION_TRIAN__X: trian: "),
        ("environment DLION_MODEL__HIDDEN", "model.hidden[1]", "environment DLION_MODEL__HIDDEN[1]: "),
    ],
)
def test_a_place_is_named_once(where: str, key: str, place: str) -> None:
    assert str(ConfigError(where, key, "found 1")) == f"{place}found 1"


def test_an_origin_is_that_of_the_nearest_key_above() -> None:
    origins = {
        "": "job.toml",
        **flag_origins(["exchange.settings", "job.until", "model.hidden"]),
        "job": "flag job.until",
    }
    assert origin_of(origins, "exchange.settings.bits") == "flag exchange.settings"
    assert origin_of(origins, "model.hidden[1]") == "flag model.hidden"
    assert origin_of(origins, "exchange.name") == "job.toml"
    assert origin_of(origins, "job.workload") == "job.toml", "another key of the table says nothing of it"
    assert origin_of({}, "exchange.name") == ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--set", "train.x=1"], "flag train.x: unknown key; expected one of batch,"),
        (["--set", "train=1"], '--set: found "train=1"; expected section.key=value'),
        (["--set", "model.hidden=[5, 0]"], "flag model.hidden[1]: found 0; expected int >= 1"),
        (["--set", "trian.x=1"], 'budget. Did you mean "train"?'),
        (["--exchange", "prid"], f'flag exchange.name: found "prid"; {NAMES}'),
        (["--exchange", "no.where:C"], "flag exchange.name: found \"no.where:C\": No module named 'no'; expected"),
        (["--exchange", "json:loads"], 'flag exchange.name: found "json:loads": it is <function'),
        (["--pace", "fre"], 'flag pace.name: found "fre"; expected one of free,'),
        (["--exchange", "diloco", "--pace", "bounded"], 'flag pace.name: "bounded" makes no sense with diloco;'),
        (["--set", "exchange.settings.bits=3"], "flag exchange.settings.bits: must be one of (32, 16, 8, 4), got 3\n"),
        (["--set", "exchange.settings.bit=3"], "flag exchange.settings.bit: unknown key; expected a setting of pride,"),
        (["--set", "exchange.settings.bits=x"], 'flag exchange.settings.bits: found "x"; expected int\n'),
        (
            ["--exchange", "full", "--set", "budget.wan_bytes_per_s=9"],
            "flag budget.wan_bytes_per_s: found 9 bytes; expected at least 1000",
        ),
        (["--set", "job.workload=digitz"], 'flag job.workload: found "digitz"; expected one of toy, digits,'),
        (["--set", "job.workload=no.where:f"], "flag job.workload: found \"no.where:f\": there is no module 'no'\n"),
    ],
)
def test_a_flag_is_named_once(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--job", "toy", "--exchange", "pride", "--until", "1", *args]) in (2, 78)
    words = capsys.readouterr().err
    assert said in words and "Traceback" not in words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[exchange]\nname = 'nosuch'", f'exchange.name: found "nosuch"; {NAMES}'),
        ("[exchange]\nname = 'pride'\nsettings = { bits = 3 }", "exchange.settings.bits: must be one of (32, 16, 8"),
        ("[exchange]\nname = 'fedavg'\nsettings = { share = 0, local_steps = 2 }", "exchange.settings.share: expected"),
        ("[exchange]\nname = 'hop'\nsettings = { backup = -1, skip = -1 }", "exchange.settings: hop: backup, stal"),
        ("[job]\nworkload = 'nosuch'", 'job.workload: found "nosuch"; expected one of toy,'),
        ("[data]\ntrain_limit = 2", 'job.workload: "digits": 2 training samples cannot serve 6 peers'),
    ],
)
def test_a_file_is_named_where_the_job_is_only_read_later(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert cli.main(["simulate", "--job", str(path), "--until", "1"]) == 78
    assert f"error: {path}: {said}" in capsys.readouterr().err


def test_a_variable_is_named_where_the_job_is_only_read_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DLION_EXCHANGE__NAME", "nosuch")
    assert cli.main(["simulate", "--job", "toy"]) == 78
    assert f'error: environment DLION_EXCHANGE__NAME: found "nosuch"; {NAMES}' in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["compare", "--seeds", "1", "--exchange", "full,nosuch"], ["demo", "--exchange", "nosuch"]]
)
def test_nothing_is_begun_for_an_unknown_name(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 78
    assert f'error: flag exchange.name: found "nosuch"; {NAMES}' in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
