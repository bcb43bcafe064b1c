"""`pst encoder train`: a sentence encoder that is trained on the config's rationales."""

from __future__ import annotations

import argparse
from pathlib import Path

from pst_dist.cli.checks import _at_least_one
from pst_dist.cli.verb import CONFIG, OVERRIDES, REBUILD, Option, verb
from pst_dist.cli.words import config_of


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
    return value


def _more() -> str:
    return """\
The base is embed.encoder, and only training rows are used. A positive is another correct rationale of the same
question. Hard negatives end elsewhere: wrong samples of the teacher (--wrong dropped.jsonl, written by `pst teach`), or
correct rationales with a number, a name or a word changed. Type the same command again to continue a stopped training.

Then:  pst probe my.yaml --encoder FOLDER --split validation     what its vectors know of the answer
       pst run my.yaml embed.encoder=FOLDER                      a student aligned with them"""


@verb(
    "train a sentence encoder on the rationales",
    "pst encoder train my.yaml -o encoders/mine --wrong rationales.teach/dropped.jsonl",
    Option("action", choices=("train",), help="train the encoder that embed.encoder names"),
    CONFIG,
    OVERRIDES,
    Option("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the trained encoder goes"),
    Option(
        "--wrong",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="wrong rationales, as hard negatives (may be repeated)",
    ),
    Option("--epochs", type=_at_least_one, default=3, help="passes over the rationales (default %(default)s)"),
    Option("--batch-size", type=_at_least_one, default=32, help="rationales per step (default %(default)s)"),
    Option("--learning-rate", type=_rate, default=2e-5, help="peak learning rate (default %(default)s)"),
    Option("--negatives", type=_at_least_one, default=2, help="hard negatives per rationale (default %(default)s)"),
    REBUILD,
    more=_more,
)
def encoder(arguments: argparse.Namespace) -> int:
    from pst_dist.embedding.encoder_card import lines
    from pst_dist.embedding.train_encoder import EncoderTraining, train_encoder

    settings = EncoderTraining(
        output=arguments.output,
        wrong=tuple(arguments.wrong),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        negatives=arguments.negatives,
    )
    manifest = train_encoder(config_of(arguments), settings, rebuild=arguments.rebuild)
    print("\n".join([f"encoder: {arguments.output}", *lines(manifest.extra)]))
    return 0
