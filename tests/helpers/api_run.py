"""Rows as Python objects, and a small run over them as the Python API takes it."""

from pathlib import Path

ROWS = [{"question": f"What is {n} + 1?", "answer": n + 1, "notes": {"why": f"{n} and one"}} for n in range(40)]
TEST = [{"question": f"What is {n} + 1?", "answer": n + 1, "notes": {"why": f"{n} and one"}} for n in range(40, 52)]


def small(output: Path, *, train=ROWS, test=TEST, **changes) -> dict:
    """Keywords of a run of eight steps over those rows."""
    keys = {
        "arm": "answer_only",
        "output_dir": output,
        "data": {
            "train": train,
            "test": test,
            "columns": {"question": "question", "answer": "answer", "rationale": "notes.why"},
            "answer_type": "number",
            "validation_size": 8,
        },
        "student": {"fresh": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}},
        "train": {
            "max_steps": 8,
            "global_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_steps": 4,
            "report_to": "none",
            "num_threads": 1,
        },
        "evaluate": {"latency_rows": 2, "max_new_tokens": 12},
    }
    return keys | changes
