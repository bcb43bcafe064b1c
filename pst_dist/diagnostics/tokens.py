"""`pst preview`: a sample as the student sees it, each token with its segment and the loss that it carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pst_dist.arms import ARMS, Segment
from pst_dist.config.run_dir import expand_arms, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sources import load_data
from pst_dist.errors import InputError
from pst_dist.student.layout import Layout, Sequence, layout_for
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.student.unreadable import unreadable_rows

COLOURS = {
    Segment.PROMPT: "dim",
    Segment.ANSWER: "bold green",
    Segment.SEMANTIC: "bold magenta",
    Segment.RATIONALE: "cyan",
}


@dataclass(frozen=True)
class PreviewToken:
    """One token of a training sequence."""

    text: str
    segment: Segment
    loss: str
    """`answer`, `rationale`, `align`, several joined by +, or nothing."""


def preview_tokens(config: Config, layout: Layout, sequence: Sequence) -> list[PreviewToken]:
    """Every token of a sequence, prompt first, with the loss that it carries."""
    aligned = ARMS[config.arm].aligned and config.loss.alignment_weight > 0
    pooled = Segment.SEMANTIC if config.loss.pooling == "token" else Segment.RATIONALE
    shown = []
    for index, token in enumerate(sequence.prompt_ids + sequence.target_ids):
        place = index - len(sequence.prompt_ids)
        segment = Segment.PROMPT if place < 0 else sequence.segments[place]
        losses = []
        if segment is Segment.ANSWER:
            losses.append("answer")
        if segment is Segment.RATIONALE and config.loss.rationale_weight > 0:
            losses.append("rationale")
        if aligned and segment is pooled:
            losses.append("align")
        shown.append(PreviewToken(layout.tokenizer.decode([token]), segment, "+".join(losses)))
    return shown


def preview(config: Config, rows: int) -> str:
    """Rich markup that shows the first training rows for each arm of the config."""
    from rich.markup import escape

    from pst_dist.student.pretrained import is_encoder_decoder
    from pst_dist.training.begun import begun_settings, settled

    samples = load_data(config, unreadable_rows(config)).splits["train"]
    if not samples:
        raise InputError("there are no training rows", "set data.train")
    tokenizer = build_tokenizer(config.student, samples)
    seq2seq = is_encoder_decoder(config.student)
    blocks = []
    for arm in expand_arms(config):
        arm = settled(arm, begun_settings(run_dir(arm)), lambda: tokenizer)
        layout = layout_for(arm, tokenizer, is_encoder_decoder=seq2seq)
        for sample in samples[:rows]:
            for sequence in layout.sequences(sample):
                blocks.append(_block(arm, layout, sequence, escape))
    legend = "  ".join(f"[{COLOURS[segment]}]{segment.name.lower()}[/]" for segment in COLOURS)
    return "\n\n".join([f"{legend}   in brackets: the loss of the preceding tokens", *blocks])


def _block(config: Config, layout: Layout, sequence: Sequence, escape: Callable[[str], str]) -> str:
    """One sequence: tokens separated by dots, grouped by segment and loss."""
    tokens = preview_tokens(config, layout, sequence)
    pieces: list[str] = []
    start = 0
    for index in range(1, len(tokens) + 1):
        if _same(tokens, start, index):
            continue
        run = tokens[start:index]
        text = escape("·".join(token.text.replace("\n", "⏎") for token in run))
        label = f" [dim]({run[0].loss})[/]" if run[0].loss else ""
        pieces.append(f"[{COLOURS[run[0].segment]}]{text}[/]{label}")
        start = index
    supervised = sum(1 for token in tokens if "answer" in token.loss or "rationale" in token.loss)
    cut = ", rationale cut" if sequence.truncated else ""
    head = (
        f"[bold]{config.arm}[/] {escape(sequence.sample_id)}: {len(tokens)} tokens, {supervised} with a cross-entropy "
        f"loss ({100 * supervised / len(tokens):.0f} %){cut}"
    )
    return "\n".join([head, *pieces])


def _same(tokens: list[PreviewToken], start: int, index: int) -> bool:
    """Whether token `index` belongs to the same group as token `start`."""
    if index >= len(tokens):
        return False
    first, here = tokens[start], tokens[index]
    return (first.segment, first.loss) == (here.segment, here.loss)
