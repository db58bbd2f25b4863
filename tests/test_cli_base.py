"""The command line's frame: instant help, static verbs, and every kind of error as its exit code."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dlion import cli
from dlion.cli import errors
from dlion.cli.options import duration
from dlion.porch import NotShownIn

ROOT = Path(__file__).parent.parent


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of a verb that raises ``error``."""

    @click.command()
    def verb() -> None:
        raise error

    monkeypatch.setattr(cli.Verbs, "get_command", lambda *_: verb)
    return cli.main(["anything"])


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    """A fresh interpreter that prints the help has loaded neither NumPy nor anything else that takes long."""
    code = "import sys; from dlion.cli import main; code = main(['--help']); print(*sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"numpy", "aiohttp", "matplotlib", "rich", "msgspec", "torch", "uvloop", "dlion.config"}
    assert all(verb.help in " ".join(done.stdout.split()) for verb in cli.VERBS.values() if not verb.hidden)


def test_every_listed_verb_can_be_loaded() -> None:
    """The static table promises only commands that exist."""
    for verb in cli.VERBS.values():
        module, _, name = verb.target.partition(":")
        assert isinstance(getattr(importlib.import_module(module), name), click.Command)


def test_blas_is_held_to_one_thread_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    cli.main(["--version"])
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]) == ("1", "3")


@pytest.mark.parametrize("args", [["nonsense"], ["--nonsense"], ["topology", "show"]])
def test_usage_errors_exit_2(args: list[str]) -> None:
    assert cli.main(args) == errors.USAGE


def test_a_configuration_error_exits_78_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["topology", "show", "hetero-sytem"]) == errors.CONFIGURATION
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert 'Did you mean "hetero-system"?' in err


def test_a_fault_says_what_where_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = errors.Fault(errors.REFUSED, "peer b1 refused us", "b1 at host:1", "another job", "start all with one job")
    assert raising(monkeypatch, fault) == errors.REFUSED
    err = capsys.readouterr().err
    for text in ("peer b1 refused us", "b1 at host:1", "another job", "start all with one job", "77"):
        assert text in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), errors.INTERRUPTED),
        (PermissionError(13, "Permission denied", "/some/file"), errors.CANNOT_READ),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn"), errors.CONFIGURATION),
        (ZeroDivisionError("oops"), errors.BUG),
        (OSError("no file in it"), errors.BUG),
        (click.ClickException("no"), errors.USAGE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exceptions_become_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    assert raising(monkeypatch, error) == code


def test_an_error_may_carry_its_own_exit_code() -> None:
    class Damaged(Exception):  # noqa: N818
        exit_code = errors.BAD_DATA

    fault = errors.fault_of(Damaged("cut short"))
    assert fault is not None and (fault.code, fault.what) == (errors.BAD_DATA, "cut short")
    fault = errors.fault_of(NotShownIn("the run is under way already"))
    assert fault is not None and fault.code == errors.REFUSED, "though it is a LinkError, too"


def test_known_errors_of_the_rooms_exist() -> None:
    """The table names classes by text, so that it imports nothing: here each name is looked up."""
    for name, (code, _) in errors.KNOWN.items():
        module, _, kind = name.partition(":")
        error = getattr(importlib.import_module(module), kind)
        assert issubclass(error, Exception) and f"## {code}:" in (ROOT / "docs/errors.md").read_text()


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, ZeroDivisionError("oops"))
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: oops" in err and "bug in dlion" in err


def test_every_exit_code_has_its_section() -> None:
    codes = {value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
    text = (ROOT / "docs/errors.md").read_text()
    assert len(codes) == 12
    assert all(f"## {code}:" in text for code in codes | {0})


def test_topology_verbs_print_results_on_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """list names all, check judges each, show --json prints one object and nothing else."""
    assert cli.main(["topology", "list"]) == 0
    assert "dynamic-system" in capsys.readouterr().out
    broken = tmp_path / "broken.toml"
    broken.write_text("talk = 'shout'\n")
    assert cli.main(["topology", "check", "demo", str(broken)]) == errors.CONFIGURATION
    out, err = capsys.readouterr()
    assert "demo: ok, 6 peers" in out and "broken.toml: talk" in err
    assert cli.main(["topology", "show", "hetero-system", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["resources"]["wan:a1>c2"]["mean_bps"] == 35e6
    assert cli.main(["topology", "show", "dynamic-system"]) == 0
    assert "20 to 50" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["-5s", "5x"])
def test_durations_of_the_command_line_are_refused_by_the_option_s_name(text: str) -> None:
    with pytest.raises(click.BadParameter, match=text) as refused:
        duration(text, "--start")
    assert refused.value.param_hint == "--start" and duration("2m", "--start") == 120
