"""How a question is put to a student and where its answer ends.

The format is saved beside the student's weights as `pst.json`, so training, evaluation and the exported model render a
question identically.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pst_dist.arms import ARMS, SEMANTIC_TOKEN, STOP_TOKEN, Asked, Segment
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample, Turns
from pst_dist.errors import ConfigError
from pst_dist.student.chat import TURN_KEYS, conversation_pieces, conversation_problem
from pst_dist.student.prompt import prompt_of


@dataclass(frozen=True)
class AnswerFormat:
    """How a question is rendered for a student, and which tokens and texts mark its answer."""

    arm: str
    prompt: str
    answer_marker: str
    max_length: int
    semantic_position: str
    semantic_tokens: int
    writes_rationale: bool = True
    """Whether the student learnt to write rationales, which needs a loss on their tokens."""
    separator: str = " "
    """Text between the prompt and the first text that a causal student writes."""
    turns: dict[str, str] | None = None
    """Texts around earlier turns and a system text (`student.chat.Prompt`); None if these are part of the question."""
    stop_token: str = STOP_TOKEN
    semantic_token: str = SEMANTIC_TOKEN
    think_below: float | None = None
    """For an exported adaptive student: it thinks first if its immediate answer has less than this probability."""

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
            return "max_length or semantic_tokens is out of range"
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain dict for `pst.json`."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def template(self, *, other: bool = False) -> str:
        """The prompt around `{question}`, with the prefix of the arm's first task, or with `other` of its second."""
        asked = ARMS[self.arm].asked
        return self.prompt.replace("{question}", asked[-1 if other else 0].prefix + "{question}")

    def asked(self, sample: ReasoningSample) -> str | Turns:
        """What a sample asks: its conversation if the format has turns, else its question with the whole context."""
        return self.put(sample.question, sample.turns)

    def put(self, question: str, turns: Turns) -> str | Turns:
        """`turns` if there are any and the format has turns, else `question`, which says the same in one text."""
        return turns if turns and self.turns is not None else question

    def conversation_problem(self, question: str | Turns) -> str | None:
        """Why the format cannot render this conversation; None when it can, and for every text."""
        return None if isinstance(question, str) else conversation_problem(self.turns or {}, question)

    def pieces(self, question: str | Turns, *, other: bool = False) -> list[str]:
        """The rendered prompt in pieces: text of the prompt and of the row in turn, the prompt's first and last.

        `other` asks for the arm's second task. Raises DataError for a conversation that cannot be rendered.
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
