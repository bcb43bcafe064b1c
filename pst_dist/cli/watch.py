"""The verb `pst watch`: one screen about a run in progress, or plain lines if standard output is not a terminal."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pst_dist.cli.verb import Option, verb

if TYPE_CHECKING:
    from pst_dist.diagnostics.watch import View


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return value


@verb(
    "watch a run in progress: losses, validation, speed, time left, ranks, warnings",
    "pst watch runs/demo",
    Option("directory", metavar="RUN", help="the output_dir of a run, or of several arms, here or on a shared disk"),
    Option("--once", action="store_true", help="print the state and exit"),
    Option("--every", type=_seconds, default=2.0, metavar="SECONDS", help="how often to refresh (default %(default)s)"),
    more=lambda: (
        "It only reads files, so you can start it anywhere, as often as you like. It ends when the run ends, with the\n"
        "run's exit code (7 if the run's process has disappeared). Ctrl-C stops watching, not the run."
    ),
)
def watch(arguments: argparse.Namespace) -> int:
    from pst_dist.diagnostics.watch import view_of
    from pst_dist.diagnostics.watch_page import lost

    folder = Path(arguments.directory)
    view = view_of(folder)
    if arguments.once:
        _print_once(view)
        return 0
    try:
        view = (_on_terminal if sys.stdout.isatty() else _as_lines)(folder, arguments.every)
    except KeyboardInterrupt:
        return 130
    if view.is_gone:
        raise lost(view)
    return view.exit_code


def _print_once(view: View) -> None:
    from rich.console import Console

    from pst_dist.diagnostics.watch_page import screen

    Console(highlight=False).print(screen(view, time.time()))


def _on_terminal(folder: Path, every: float) -> View:
    """Redraw the screen until the run ends; returns the last view."""
    from rich.console import Console
    from rich.live import Live

    from pst_dist.diagnostics.watch import view_of
    from pst_dist.diagnostics.watch_page import screen

    view = view_of(folder)
    with Live(screen(view, time.time()), console=Console(highlight=False), auto_refresh=False) as display:
        while not view.has_ended:
            time.sleep(every)
            view = view_of(folder)
            display.update(screen(view, time.time()), refresh=True)
    return view


def _as_lines(folder: Path, every: float) -> View:
    """Print a line for each thing that has changed, until the run ends; returns the last view."""
    from pst_dist.diagnostics.watch import view_of
    from pst_dist.diagnostics.watch_page import Told, end_words

    told = Told()
    while True:
        view = view_of(folder)
        for line in told.news(view):
            print(line, flush=True)
        if view.has_ended:
            print(end_words(view), flush=True)
            return view
        time.sleep(every)
