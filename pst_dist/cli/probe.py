"""The verb `probe`: how well the targets of the alignment term predict the answer, before anything is trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pst_dist.cli.verb import CONFIG, OVERRIDES, Option, positive_whole, verb
from pst_dist.cli.words import config_of


@verb(
    "predict whether the alignment loss can help: test how well embeddings predict the answer",
    "pst probe my.yaml --encoder smollm2,layer=15",
    CONFIG,
    OVERRIDES,
    Option(
        "--encoder",
        metavar="NAME",
        action="append",
        default=[],
        help="also probe this encoder, with its settings: NAME,layer=15,pooling=last (may be repeated)",
    ),
    Option("-n", "--rows", type=positive_whole, default=1000, help="maximum number of rows (default %(default)s)"),
    Option(
        "--split",
        choices=("train", "validation"),
        help="use only this split; use validation for an encoder that was trained on the training rows (default: both)",
    ),
    Option("--json", action="store_true", help="print the numbers as JSON"),
)
def probe(arguments: argparse.Namespace) -> int:
    from pst_dist.diagnostics.probe import probe

    report = probe(
        config_of(arguments),
        arguments.encoder,
        most_rows=arguments.rows,
        from_run=Path(arguments.config).is_dir(),
        split=arguments.split,
    )
    print(json.dumps(report.to_json(), indent=2) if arguments.json else "\n".join(report.lines()))
    return 0
