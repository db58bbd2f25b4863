"""The command line: one verb per file, loaded when it is called, and the one place where errors become exit codes.

Law: imports click and nothing heavier, so that ``dlion --help`` is instant. Only here may any exception be caught.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import click

from dlion import __version__
from dlion.cli import errors


class Verb(NamedTuple):
    target: str
    """``module:command``."""
    help: str
    hidden: bool = False


VERBS: Mapping[str, Verb] = {
    "demo": Verb("dlion.cli.demo:command", "Watch six peers in three micro-clouds train one model on this machine."),
    "peer": Verb("dlion.cli.peer:command", "Start one peer on this host."),
    "up": Verb("dlion.cli.up:command", "Start every peer of a topology on this machine, one process each."),
    "simulate": Verb("dlion.cli.simulate:command", "Run a topology in virtual time, in one process."),
    "compare": Verb("dlion.cli.compare:command", "Run several strategies over several seeds: a league table."),
    "replay": Verb("dlion.cli.replay:command", "Run a recorded run again in virtual time, perhaps changed."),
    "record": Verb("dlion.cli.record:command", "Turn a run's logs into a topology with traces."),
    "explain": Verb("dlion.cli.explain:command", "Say where a run's time went, and what would change it."),
    "trace": Verb("dlion.cli.trace:trace", "Show trace files."),
    "checkpoint": Verb("dlion.cli.checkpoint:checkpoint", "List, verify and export the checkpoints of a run."),
    "report": Verb("dlion.cli.report:report", "Draw one run, or compare several."),
    "cell": Verb("dlion.cli.compare:cell", "One simulated run of a comparison.", hidden=True),
    "evaluate": Verb("dlion.cli.evaluate:command", "Measure a run's snapshots.", hidden=True),
    "managed": Verb("dlion.cli.managed:command", "One peer of `dlion up`.", hidden=True),
    "topology": Verb("dlion.cli.topology:topology", "Show, check and list topologies."),
}
"""In the order of ``--help``; the texts stand here so that no verb is imported to print them."""


class Verbs(click.Group):
    """A click group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, verb in VERBS.items() if not verb.hidden]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, VERBS[name].help) for name in self.list_commands(ctx)])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"dlion {__version__}")
        ctx.exit()


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def dlion() -> None:
    """Train one model across many sites with no central server, over the links they really have."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit code (docs/errors.md)."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # peers are the parallelism; and one thread makes sums reproducible
    try:
        code = dlion.main(args, prog_name="dlion", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return errors.USAGE if error.exit_code == 1 else error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return errors.INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as ``head`` does: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.CANNOT_WRITE
    except Exception as error:
        fault = errors.fault_of(error)
        if fault is None:
            click.echo(errors.bug_notice(error, __version__), err=True)
            return errors.BUG
        click.echo(fault.text(), err=True)
        return fault.code
