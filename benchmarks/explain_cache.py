"""What a rationale saves when it continues from its answer's keys and values (`student.explain`).

    python benchmarks/explain_cache.py [--model smollm2] [--prompts 32 256] [--batches 1 8] [--rounds 5]

Any causal model serves, since time does not depend on what it has learnt: its head is made to end each answer after
`--answer` tokens and each rationale after `--rationale`. Both ways take turns within a round; CPU seconds are compared.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from measuring import CLOCKS, compared, paired_rounds

from pst_dist.config.schema import Config
from pst_dist.logs import quiet_libraries
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.explain import decode_explained
from pst_dist.student.pretrained import build_model
from pst_dist.student.tokenizer import build_tokenizer


class Ending(torch.nn.Module):
    """A head under which the stop token is the most probable one at each answer's given length, and never else."""

    def __init__(self, head: torch.nn.Module, stop: int, end: int, length: int) -> None:
        super().__init__()
        self.head, self.stop, self.end, self.length, self.calls = head, stop, end, length, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        self.calls += 1
        logits[..., self.end] = -1e4
        logits[..., self.stop] = 1e4 if self.calls == self.length else -1e4
        return logits


def measured(
    model: Any, tokenizer: Any, fmt: AnswerFormat, head: Ending, options: argparse.Namespace
) -> dict[str, Any]:
    """{prompt tokens, batch: times of both ways} for each combination."""
    table = {}
    for prompt in options.prompts:
        for batch in options.batches:
            questions = [f"{number} " + "word " * (prompt - 4) for number in range(batch)]

            def once(reuse: bool, asked: list[str] = questions) -> list[str]:
                head.calls = 0
                answers, rationales = decode_explained(
                    model, tokenizer, fmt, asked, batch_size=len(asked), max_new_tokens=options.rationale, reuse=reuse
                )
                assert all(answer.answer_tokens == options.answer for answer in answers)
                return rationales

            same = once(True) == once(False)
            seconds = paired_rounds(
                {"reuse": lambda: once(True), "again": lambda: once(False)}, options.rounds, CLOCKS["cpu"]
            )
            table[f"{prompt} tokens, batch {batch}"] = {**compared(seconds, "reuse"), "same_rationales": same}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--answer", type=int, default=4)
    parser.add_argument("--rationale", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    keys = {"student": {"model_name_or_path": options.model}, "arm": "pst", "layout": {"max_length": 512}}
    config = Config.model_validate(keys)
    tokenizer = build_tokenizer(config.student, [])
    model, fmt = build_model(config, tokenizer).eval(), AnswerFormat.of(config)
    head = Ending(
        model.get_output_embeddings(),
        tokenizer.convert_tokens_to_ids(fmt.stop_token),
        tokenizer.eos_token_id,
        options.answer,
    )
    model.set_output_embeddings(head)
    print(json.dumps(measured(model, tokenizer, fmt, head, options), indent=2))


if __name__ == "__main__":
    main()
