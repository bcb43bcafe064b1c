"""`pst encoder train`: a sentence encoder that is trained on the config's rationales."""

from __future__ import annotations

import argparse
from pathlib import Path

from pst_dist.cli.verb import CONFIG, OVERRIDES, REBUILD, Option, positive_whole, verb
from pst_dist.cli.words import config_of


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
    return value


def _more() -> str:
    return """\
Training starts from embed.encoder and uses only training rows. A positive is another correct rationale of the same
question. Hard negatives are rationales with another conclusion: the teacher's wrong ones (--wrong dropped.jsonl,
written by `pst teach`), or correct ones with a number, a name or a word changed. If training is interrupted, run the
same command again to resume.

Then:  pst probe my.yaml --encoder FOLDER --split validation     how well its vectors predict the answer
       pst run my.yaml embed.encoder=FOLDER                      train a student aligned with them"""


@verb(
    "train a sentence encoder on the rationales",
    "pst encoder train my.yaml -o encoders/mine --wrong rationales.teach/dropped.jsonl",
    Option("action", choices=("train",), help="train the encoder named by embed.encoder"),
    CONFIG,
    OVERRIDES,
    Option("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where to write the trained encoder"),
    Option(
        "--wrong",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="wrong rationales to use as hard negatives (may be repeated)",
    ),
    Option("--epochs", type=positive_whole, default=3, help="passes over the rationales (default %(default)s)"),
    Option("--batch-size", type=positive_whole, default=32, help="rationales per step (default %(default)s)"),
    Option("--learning-rate", type=_rate, default=2e-5, help="peak learning rate (default %(default)s)"),
    Option("--negatives", type=positive_whole, default=2, help="hard negatives per rationale (default %(default)s)"),
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
