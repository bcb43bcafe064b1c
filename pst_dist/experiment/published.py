"""Published accuracies for the twelve tasks, for comparison.

From the results notebook of Fine-tune-CoT (itsnamgyu/reasoning-teacher; Ho et al., "Large Language Models Are Reasoning
Teachers", arXiv 2212.10071): answer-only fine-tuning (FT) and chain-of-thought fine-tuning (CoT) of the same students.
The reported epoch is the best on the test set, and the FT rows include those on which the teacher is wrong.
"""

from __future__ import annotations

PUBLISHED_TASKS = (
    *("single_eq", "addsub", "multiarith", "gsm8k", "aqua", "svamp", "date_understanding"),
    *("tracking_shuffled_objects", "last_letter_concatenation", "coin_flip", "commonsense_qa", "strategy_qa"),
)
"""In the order of the notebook's tables."""

PUBLISHED: dict[str, tuple[float, ...]] = {
    "random": (0.00, 0.00, 0.00, 0.00, 20.00, 0.00, 17.12, 33.33, 0.00, 50.00, 20.00, 50.00),
    "teacher, 175B, zero-shot": (81.50, 76.71, 78.79, 42.17, 29.74, 64.20, 67.58, 53.20, 57.71, 90.04, 60.07, 53.45),
    "Flan-T5 base, 220M, FT": (5.26, 10.08, 16.11, 5.08, 29.53, 10.67, 83.78, 44.00, 45.33, 100.00, 63.55, 61.14),
    "Flan-T5 base, 220M, CoT": (4.61, 9.24, 12.22, 4.40, 29.13, 6.00, 83.78, 48.89, 50.00, 100.00, 59.05, 59.97),
    "GPT-2 small, 124M, FT": (5.26, 9.24, 12.22, 2.73, 24.80, 10.33, 27.93, 33.78, 1.33, 60.00, 20.88, 54.44),
    "GPT-2 small, 124M, CoT": (3.95, 5.88, 8.33, 3.03, 22.44, 4.33, 25.23, 38.67, 4.67, 77.33, 22.69, 55.75),
    "GPT-2 medium, 355M, FT": (4.61, 8.40, 12.22, 1.59, 24.80, 12.00, 20.72, 33.78, 2.00, 55.33, 20.23, 54.59),
    "GPT-2 medium, 355M, CoT": (5.92, 10.92, 7.78, 2.81, 24.41, 7.33, 25.23, 42.22, 12.00, 83.33, 21.70, 56.19),
}
"""Label -> accuracy in %, one per task of PUBLISHED_TASKS."""
