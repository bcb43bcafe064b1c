"""A student's answer to one question; plain values, so that reading it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One question's answer."""

    text: str
    """The answer alone, without surrounding white space."""
    tokens: int
    """Tokens generated for the answer, including its stop token; with `thought_first` also those of the rationale and
    of the first answer."""
    complete: bool
    """Whether the answer ended with its stop token; if not, it was cut off at the token limit."""
    probability: float
    """Joint probability of the answer's tokens, 0 to 1; with `thought_first` that of the first answer."""
    seconds: float
    """Wall time to the answer, without the rationale; for a batch of questions, the mean per question."""
    rationale: str | None = None
    """The rationale; None if it was not requested or the student wrote none."""
    thought_first: bool = False
    """Whether the student wrote its rationale before this answer."""
    confidence: float = 1.0
    """Geometric mean of the probabilities of the answer's own tokens, 0 to 1. Unlike `probability` it does not fall
    with the length of the answer, and with `thought_first` it is that of the final answer."""
