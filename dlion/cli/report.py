"""``dlion report``: what one run did, or how several compare, as one HTML file and its pictures.

Law: options in, files out; all work is ``observe``'s.
"""

from __future__ import annotations

from pathlib import Path

import click


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
    from dlion.observe.read import read_directory
    from dlion.observe.report import build_report

    runs = [read_directory(directory) for directory in directories]
    for path in build_report(runs, out or directories[0] / "report.html"):
        click.echo(path)
