"""What a student says to one question; plain values, so that reading it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One question's answer."""

    text: str
    """The answer alone, without outer white space."""
    tokens: int
    """Tokens generated for the answer, its stop token included; with `thought_first` those of the rationale and of the
    first answer too."""
    complete: bool
    """Whether the answer ended with its stop token; if not, it was cut off at the token limit."""
    probability: float
    """What the student gives these answer tokens together, 0 to 1; with `thought_first` those of its first answer."""
    seconds: float
    """Wall time to the answer, without the rationale; for questions asked together, their time divided by their
    number."""
    rationale: str | None = None
    """The reasons, when they were asked for; None if not, or where the student wrote none."""
    thought_first: bool = False
    """Whether the student wrote its rationale before this answer."""
