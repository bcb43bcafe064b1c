"""How an arm turns a sample into token sequences: which segments, in which order, and where a rationale is cut off."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pst_dist.arms import ARMS, Arm, Segment
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample, Turns
from pst_dist.errors import ConfigError, DataError
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.text_ids import TextIds

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sequence:
    """One training sequence: the tokens that are given, those to be produced, and the segment of each of these."""

    sample_id: str
    rationale: int
    """Index into the sample's rationales; with `sample_id` it names the teacher's embedding."""
    prompt_ids: list[int]
    target_ids: list[int]
    segments: list[Segment]
    """One per target token."""
    truncated: bool
    """Whether the rationale lost its end to max_length."""


class Layout:
    """Tokenises samples for one arm; a pure function of sample, rationale index and settings.

    The prompt and the target of an encoder-decoder may have max_length tokens each; those of a causal model share them.
    `keep_rationale=False` leaves out the tokens of the rationale, for losses that do not use them. `shuffle_seed`
    shuffles them, for the control `shuffle_rationale_tokens`.
    """

    def __init__(
        self,
        tokenizer: Any,
        fmt: AnswerFormat,
        *,
        is_encoder_decoder: bool,
        keep_rationale: bool = True,
        shuffle_seed: int | None = None,
    ) -> None:
        self.tokenizer, self.format, self.arm = tokenizer, fmt, ARMS[fmt.arm]
        self.is_encoder_decoder = is_encoder_decoder
        self.keep_rationale, self.shuffle_seed = keep_rationale, shuffle_seed
        self.text_ids = TextIds(tokenizer)
        self.stop_id = tokenizer.convert_tokens_to_ids(fmt.stop_token)
        self.semantic_id = tokenizer.convert_tokens_to_ids(fmt.semantic_token)

    def _plain(self, text: str) -> list[int]:
        return self.text_ids.text(text)

    def _behind_space(self, text: str) -> list[int]:
        return self._plain(" " + text)

    def first_ids(self, text: str) -> list[int]:
        """Token ids of the text that the student writes directly after the prompt.

        After a chat template they are the tokens that prompt and text have together. A decoder begins with its own
        start token, so the text gets a space before it, like every later one.
        """
        if self._begins_with_space:
            return self._behind_space(text)
        before = self.format.prompt.partition("{question}")[2]
        return self.text_ids.continuation(before, self.format.separator + text)

    @property
    def _begins_with_space(self) -> bool:
        return self.is_encoder_decoder or (self.format.separator == " " and self.format.turns is None)

    def prompt_ids(self, question: str | Turns, *, other: bool = False) -> list[int]:
        """Token ids of the rendered question, exactly as `tokenizer(text)` gives them to any other program.

        The exception is a control token that is spelled out in the question: here it is ordinary text. Raises
        DataError for a tokenizer that cannot read it as text.
        """
        return self.text_ids.mixed(self.format.pieces(question, other=other))

    def many(self, rows: Iterable[tuple[ReasoningSample, int]]) -> list[list[Sequence]]:
        """`sequences` of many samples and rationale indices, in a fraction of the time; raises DataError as it does."""
        rows = list(rows)
        texts, pieces = [self.format.answer_marker], []
        for sample, rationale in rows:
            asked = self.format.asked(sample)
            if self.format.conversation_problem(asked) is None:
                pieces += [self.format.pieces(asked, other=index > 0) for index in range(len(self.arm.asked))]
            texts += [" " + text for text in self._written_behind_space(sample, rationale)]
        with self.text_ids.encoded_together(list(dict.fromkeys(texts)), pieces):
            return [self.sequences(sample, rationale) for sample, rationale in rows]

    def _written_behind_space(self, sample: ReasoningSample, rationale: int) -> Iterator[str]:
        """The texts of a sample's sequences that are encoded with a space before them."""
        for asked in self.arm.asked:
            written = [segment for segment in self.format.order(asked) if segment is not Segment.SEMANTIC]
            for segment in written if self._begins_with_space else written[1:]:
                if segment is Segment.ANSWER:
                    yield sample.answer
                elif segment is Segment.RATIONALE and self.keep_rationale and sample.rationales:
                    yield sample.rationales[rationale]

    def sequences(self, sample: ReasoningSample, rationale: int = 0) -> list[Sequence]:
        """One sequence (two in the arms prefix and adaptive) for a sample.

        Raises DataError when the arm needs a rationale and the sample has none, when a text spells out a control
        token that this tokenizer cannot read as text, or when question and answer alone exceed max_length. A rationale
        that does not fit loses its end; the answer never loses a token.
        """
        where = sample.source or sample.id
        if self.arm.needs_rationale and not sample.rationales:
            raise DataError(
                f"sample {sample.id} has no rationale, which arm {self.arm.name} needs",
                "give it one, or train arm=answer_only",
                path=where,
            )
        try:
            return [
                self._sequence(sample, rationale, self.format.order(asked), other=index > 0, where=where)
                for index, asked in enumerate(self.arm.asked)
            ]
        except DataError as error:
            raise DataError(error.what, error.remedy, path=error.path or where, line=error.line) from None

    def _sequence(
        self, sample: ReasoningSample, rationale: int, order: tuple[Segment, ...], *, other: bool, where: str
    ) -> Sequence:
        prompt = self.prompt_ids(self.format.asked(sample), other=other)
        written = [segment for segment in order if segment is not Segment.SEMANTIC]
        first = {segment: self.first_ids if segment is written[0] else self._behind_space for segment in written}
        parts = {
            Segment.ANSWER: [*first.get(Segment.ANSWER, self._behind_space)(sample.answer), self.stop_id],
            Segment.SEMANTIC: [self.semantic_id] * self.format.semantic_tokens,
        }
        truncated = False
        with_rationale = Segment.RATIONALE in order and self.keep_rationale
        thinks_first = with_rationale and Segment.ANSWER in order[order.index(Segment.RATIONALE) :]
        marker = self._plain(self.format.answer_marker) if thinks_first else []
        fixed = sum(len(parts[segment]) for segment in order if segment in parts) + len(marker)
        taken = fixed if self.is_encoder_decoder else fixed + len(prompt)
        if max(taken, len(prompt)) > self.format.max_length:
            raise DataError(
                f"sample {sample.id}: question and answer take {max(taken, len(prompt))} tokens, layout.max_length "
                f"is {self.format.max_length}",
                "raise layout.max_length, or leave the row out",
                path=where,
            )
        if with_rationale:
            body = first[Segment.RATIONALE](sample.rationales[rationale])
            if self.shuffle_seed is not None:
                random.Random(f"{self.shuffle_seed}/{sample.id}/{rationale}").shuffle(body)
            if not thinks_first:
                body.append(self.tokenizer.eos_token_id)
            room = self.format.max_length - taken
            truncated = len(body) > room
            parts[Segment.RATIONALE] = body[:room] + marker
        target: list[int] = []
        segments: list[Segment] = []
        for segment in order:
            piece = parts.get(segment, [])
            target += piece
            segments += [segment] * len(piece)
        return Sequence(sample.id, rationale, prompt, target, segments, truncated)


def forward_passes(arm: Arm, laid_out: list[list[Item]]) -> list[list[Item]]:
    """Which sequences go through the student together: those with a rationale, and those without.

    `laid_out` has the sequences of each sample, or other items in their place, in the order of `Layout.sequences`. In
    one batch, an answer alone would be padded to the length of the rationales.
    """
    writes = [Segment.RATIONALE in asked.order for asked in arm.asked]
    return [
        [sequence for sample in laid_out for sequence, one in zip(sample, writes, strict=True) if one is kind]
        for kind in dict.fromkeys(writes)
    ]


def layout_for(config: Config, tokenizer: Any, *, is_encoder_decoder: bool) -> Layout:
    """The layout of a config's arm, without rationale tokens if neither a loss nor the pooling uses them.

    Raises ConfigError for an arm that must write its rationale but has no loss for it.
    """
    arm, loss = ARMS[config.arm], config.loss
    if any(asked.order[0] is Segment.RATIONALE for asked in arm.asked) and loss.rationale_weight == 0:
        raise ConfigError(f"loss.rationale_weight is 0, but {config.arm} must learn to write its rationale")
    return Layout(
        tokenizer,
        AnswerFormat.of(config, tokenizer),
        is_encoder_decoder=is_encoder_decoder,
        keep_rationale=loss.rationale_weight > 0 or (loss.pooling == "span" and arm.aligned),
        shuffle_seed=config.seed if loss.control == "shuffle_rationale_tokens" else None,
    )
