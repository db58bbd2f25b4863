"""``dlion report``: what one run did, or how several compare, as one HTML file and its pictures.

Law: options in, files out; all work is ``observe``'s.
"""

from __future__ import annotations

from pathlib import Path

import click


class Failure(click.ClickException):
    """One line on stderr and an exit code of its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@click.command()
@click.argument(
    "directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="HTML file to write; pictures lie beside it.  [default: report.html in the first DIR]",
)
def report(directories: tuple[Path, ...], out: Path | None) -> None:
    """Draw the runs whose logs lie in DIR, several of them overlaid.

    Writes one HTML file that needs nothing else, and its pictures as PNG files beside it.
    """
    from dlion.observe.read import DamagedLogError, read_directory
    from dlion.observe.report import ReportError, build_report

    try:
        runs = [read_directory(directory) for directory in directories]
    except DamagedLogError as error:
        raise Failure(str(error), 65) from error
    except OSError as error:
        raise Failure(f"cannot read {error.filename}: {error.strerror}", 74) from error
    try:
        written = build_report(runs, out or directories[0] / "report.html")
    except ReportError as error:
        raise Failure(str(error), 78) from error
    except OSError as error:
        raise Failure(f"cannot write {error.filename}: {error.strerror}", 73) from error
    for path in written:
        click.echo(path)
