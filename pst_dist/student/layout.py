"""How an arm turns a sample into tokens: which segments, in which order, and which of them are supervised.

The same `AnswerFormat` is saved with the student, so training, evaluation and the exported model render a question
identically.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pst_dist.arms import ARMS, SEMANTIC_TOKEN, STOP_TOKEN, Arm, Asked, Segment
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample, Turns
from pst_dist.errors import ConfigError, DataError
from pst_dist.student.chat import TURN_KEYS, conversation_pieces, conversation_problem
from pst_dist.student.prompt import prompt_of
from pst_dist.student.text_ids import TextIds

Item = TypeVar("Item")


@dataclass(frozen=True)
class AnswerFormat:
    """How questions are put to a student and where its answer ends; saved beside its weights as `pst.json`."""

    arm: str
    prompt: str
    answer_marker: str
    max_length: int
    semantic_position: str
    semantic_tokens: int
    writes_rationale: bool = True
    """Whether the student learnt to write rationales; without a loss on their tokens there is none to ask for."""
    separator: str = " "
    """Text between the prompt and what a causal student writes first."""
    turns: dict[str, str] | None = None
    """Texts around earlier turns and a system text (`student.chat.Prompt`); None where they are part of a question."""
    stop_token: str = STOP_TOKEN
    semantic_token: str = SEMANTIC_TOKEN
    think_below: float | None = None
    """An exported adaptive student's: it thinks first where its answer at once has less than this probability."""

    @classmethod
    def of(cls, config: Config, tokenizer: Any = None) -> AnswerFormat:
        """The format that a config describes; raises ConfigError for a prompt that cannot be used.

        `tokenizer` is the student's. Only a pretrained student with `layout.prompt: auto` needs it.
        """
        layout, asked = config.layout, prompt_of(config, tokenizer)
        texts = {"prompt": asked.template, "separator": asked.separator, "answer_marker": layout.answer_marker}
        for key, text in texts.items():
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ConfigError(
                    f"layout.{key}: {text!r} contains half of a surrogate pair", "write the character itself"
                )
        if not layout.answer_marker.strip():
            raise ConfigError("layout.answer_marker is blank: the answer after a rationale could not be found")
        return cls(
            arm=config.arm,
            prompt=asked.template,
            separator=asked.separator,
            turns=asked.turns,
            answer_marker=layout.answer_marker,
            max_length=layout.max_length,
            semantic_position=layout.semantic_position,
            semantic_tokens=layout.semantic_tokens,
            writes_rationale=ARMS[config.arm].needs_rationale and config.loss.rationale_weight > 0,
        )

    def problem(self) -> str | None:
        """What is wrong with a format that was read from a file; None when nothing is."""
        if self.arm not in ARMS:
            return f"arm: {self.arm[:40]!r} is none of {', '.join(ARMS)}"
        if self.prompt.count("{question}") != 1:
            return "prompt: does not hold {question} exactly once"
        if self.turns is not None and not self.turns.keys() <= set(TURN_KEYS):
            return f"turns: has keys other than {', '.join(TURN_KEYS)}"
        if not (self.answer_marker.strip() and self.stop_token and self.semantic_token):
            return "answer_marker, stop_token and semantic_token may not be blank"
        if self.max_length < 1 or self.semantic_tokens < 0:
            return "max_length and semantic_tokens are out of range"
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain dict for `pst.json`."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def template(self, *, other: bool = False) -> str:
        """The prompt around `{question}` with the arm's prefix; `other` is that of the second thing its arm learnt."""
        asked = ARMS[self.arm].asked
        return self.prompt.replace("{question}", asked[-1 if other else 0].prefix + "{question}")

    def asked(self, sample: ReasoningSample) -> str | Turns:
        """What a sample asks: its conversation where the prompt holds turns, else its question, which has all of it."""
        return self.put(sample.question, sample.turns)

    def put(self, question: str, turns: Turns) -> str | Turns:
        """What is asked of a question with all its context as one text, and the conversation that it ends, if any."""
        return turns if turns and self.turns is not None else question

    def conversation_problem(self, question: str | Turns) -> str | None:
        """Why the prompt cannot hold what is asked; None where it can, as for every text."""
        return None if isinstance(question, str) else conversation_problem(self.turns or {}, question)

    def pieces(self, question: str | Turns, *, other: bool = False) -> list[str]:
        """The text that is put to the student, by turns the prompt's and the row's, the prompt's first and last.

        `other` asks for the second thing that its arm learnt. Raises DataError for a conversation without a place.
        """
        if isinstance(question, str):
            before, _, after = self.template(other=other).partition("{question}")
            return [before, question, after]
        prefix = ARMS[self.arm].asked[-1 if other else 0].prefix
        return conversation_pieces(self.prompt, self.turns or {}, question, prefix)

    def render(self, question: str | Turns, *, other: bool = False) -> str:
        """`pieces` as one text."""
        return "".join(self.pieces(question, other=other))

    @property
    def semantic_before(self) -> bool:
        """Whether a semantic token is part of what precedes the answer."""
        return ARMS[self.arm].aligned and self.semantic_position == "before"

    def order(self, asked: Asked) -> tuple[Segment, ...]:
        """Segments after the prompt, with the semantic token where this format puts it."""
        if self.semantic_before and Segment.SEMANTIC in asked.order:
            return (Segment.SEMANTIC, *(segment for segment in asked.order if segment is not Segment.SEMANTIC))
        return asked.order


@dataclass(frozen=True)
class Sequence:
    """One training sequence: what is given, what is to be produced, and who owns each produced token."""

    sample_id: str
    rationale: int
    """Index into the sample's rationales; joins the teacher's embedding."""
    prompt_ids: list[int]
    target_ids: list[int]
    segments: list[Segment]
    """One a target token."""
    truncated: bool
    """Whether the rationale lost its end to max_length."""


class Layout:
    """Tokenises samples for one arm; a pure function of sample, rationale index and settings.

    An encoder-decoder's prompt and target each have max_length tokens; a causal model's share them.
    `keep_rationale=False` leaves the rationale's tokens out where no loss reads them (PST's pure reading).
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

        Behind a chat template they are those of the two texts together. A decoder has a start token of its own there,
        and gets a space as in every other place.
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

        A control token that is spelled out in the question is the exception: here it is text. Raises DataError for a
        tokenizer that cannot read it so.
        """
        return self.text_ids.mixed(self.format.pieces(question, other=other))

    def many(self, rows: Iterable[tuple[ReasoningSample, int]]) -> list[list[Sequence]]:
        """`sequences` of many samples and rationale indices, in a fraction of the time; raises DataError alike."""
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

    `laid_out` has the sequences of each sample (or what stands for them), in the order of `Layout.sequences`. In one
    batch an answer alone would be padded to the length of the rationales beside it.
    """
    writes = [Segment.RATIONALE in asked.order for asked in arm.asked]
    return [
        [sequence for sample in laid_out for sequence, one in zip(sample, writes, strict=True) if one is kind]
        for kind in dict.fromkeys(writes)
    ]


def layout_for(config: Config, tokenizer: Any, *, is_encoder_decoder: bool) -> Layout:
    """The layout of a config's arm; the rationale's tokens stay out where neither a loss nor a pool reads them.

    Raises ConfigError for an arm that must write its rationale but is given no loss for it.
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


def variant_of(config: Config) -> list[str]:
    """What sets a run apart from its arm's plain form: the controls and ablations, in words."""
    words = {"shuffle_embeddings": "shuffled embeddings", "shuffle_rationale_tokens": "shuffled rationale tokens"}
    variant = [words[config.loss.control]] if config.loss.control in words else []
    arm = ARMS[config.arm]
    if arm.aligned and config.loss.alignment_weight == 0:
        variant.append("no alignment")
    if arm.needs_rationale and config.loss.rationale_weight == 0:
        variant.append("no rationale tokens")
    if arm.aligned and config.layout.semantic_position == "before":
        variant.append("semantic token before")
    if arm.aligned and config.loss.alignment_weight > 0 and not config.loss.centre:
        variant.append("not centred")
    if arm.aligned and config.loss.alignment_weight > 0:
        loss = config.loss
        variant += ["whitened"] if loss.whiten else []
        variant += [f"layer {loss.layer}"] if loss.layer is not None else []
        variant += ["mean of all rationales"] if loss.rationales == "mean" else []
        variant += ["fitted head"] if loss.head_init == "ridge" else []
        variant += [f"alignment share {loss.alignment_share:g}"] if loss.alignment_share is not None else []
    if not arm.answers_first and config.evaluate.rationale != "own":
        variant.append(f"given {config.evaluate.rationale} rationales")
    if arm.needs_rationale and config.data.wrong_rationales:
        variant.append(f"{100 * config.data.wrong_rationales:g} % wrong rationales")
    return variant
