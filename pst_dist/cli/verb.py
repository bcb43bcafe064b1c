"""How a verb of `pst` is defined: its help, an example, its options and its function, in one place.

    @verb("decode and score the test rows", "pst evaluate runs/demo/pst", CONFIG, OVERRIDES, REBUILD)
    def evaluate(arguments: argparse.Namespace) -> int: ...

`main` lists the verbs in the order of the help.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Option:
    """One option or positional argument of a verb; takes the arguments of `ArgumentParser.add_argument`."""

    def __init__(self, *names: str, **settings: Any) -> None:
        self.names, self.settings = names, settings


CONFIG = Option("config", help="config file, run directory, or name of a ready-made config")
MAYBE_CONFIG = Option("config", nargs="?", help="config file, run directory, or name of a ready-made config")
REBUILD = Option("--rebuild", action="store_true", help="replace outputs that were made from other inputs")
_VERBOSE = Option("-v", "--verbose", action="store_true", help="print more")
_QUIET = Option("-q", "--quiet", action="store_true", help="print only problems")
COMMON_OPTIONS = (*_VERBOSE.names, *_QUIET.names)
"""The options that every verb has."""


def overrides(
    help: str = "override any config key; +NAME applies an overlay", metavar: str = "key.sub=value"
) -> Option:
    """The arguments `key.sub=value` and `+NAME`, which may appear anywhere among the options."""
    # Without a default, argparse lists it among the required arguments; with None it is still an empty list.
    return Option("overrides", nargs="*", default=None, metavar=metavar, help=help)


OVERRIDES = overrides()


@dataclass
class Verb:
    """One verb; calling it runs it and returns the exit code."""

    function: Callable[[argparse.Namespace], int]
    name: str
    help: str
    """One line, as shown in the list of verbs."""
    example: str
    options: tuple[Option, ...]
    on: tuple[str, ...]
    """The keys that `on=ray` on the command line sets; empty for verbs without it."""
    more: Callable[[], str] | None
    """Further paragraphs of its help, generated only when the help is shown."""

    def __call__(self, arguments: argparse.Namespace) -> int:
        return self.function(arguments)

    def add_to(self, subparsers: Any) -> None:
        """Add this verb to the parser of `pst`."""
        parser = subparsers.add_parser(
            self.name,
            help=self.help,
            description=self.help[0].upper() + self.help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.verb = self
        for option in (*self.options, _VERBOSE, _QUIET):
            parser.add_argument(*option.names, **option.settings)
        parser.set_defaults(run=self, on=self.on)

    @property
    def epilogue(self) -> str:
        """The end of its help."""
        parts = [f"example: {self.example}\nkeys:    pst config --schema"]
        return "\n\n".join([*parts, self.more()] if self.more else parts)


class Parser(argparse.ArgumentParser):
    """A parser whose epilogue is generated when the help is shown."""

    verb: Verb | None = None

    def format_help(self) -> str:
        if self.verb is not None:
            self.epilog = self.verb.epilogue
        return super().format_help()


def positive_whole(text: str) -> int:
    """The type of an option that takes a positive whole number; raises argparse's error for any other text."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def verb(
    help: str,
    example: str,
    *options: Option,
    on: tuple[str, ...] = (),
    more: Callable[[], str] | None = None,
) -> Callable[[Callable[[argparse.Namespace], int]], Verb]:
    """Decorator that turns a function into the verb of the same name."""
    return lambda function: Verb(function, function.__name__, help, example, options, on, more)
