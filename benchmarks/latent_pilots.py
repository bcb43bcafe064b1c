"""Ways to answer several operations at once, compared on equal rows and steps: filler dots, self-distillation, removal.

    python benchmarks/latent_pilots.py [VARIANT …] [--operations 3] [--rows 40000] [--steps 1100] [--dots 3] [--seed 0]
                                       [--threads 1] [--output FILE]

Each VARIANT trains the demo's student, with four layers, on rows of the generator "arithmetic":

    post              the answer, then the rationale
    dots              the same after some filler dots
    joint             dots, and for each row also a second sequence that thinks first and then answers
    self_distilled    joint, with the hidden states before the answer tied to those of the second sequence (CODI, arXiv
                      2502.21074): L1 over all layers, each divided by its standard deviation, no gradient to the
                      thinking sequence, whose rationale lacks its last step
    internalised      thinks first; rationale tokens are removed from the front until none is left (arXiv 2405.14838)

None has the semantic term. The loss is that of `pst train`: answer and rationale count equally, each by its mean over
tokens. Accuracy is that of 400 validation rows, answered without any rationale. These are pilots: they show which of
these ideas is worth an arm.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from pst_dist.arms import STOP_TOKEN
from pst_dist.config.loading import load_config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.sources.generators import generate
from pst_dist.logs import progress, quiet_libraries
from pst_dist.storage.manifest import write_json
from pst_dist.student.pretrained import build_model
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.engines.optimizer import adamw

# Shapes in this file: B rows, T tokens, D width, L layers

VARIANTS = ("post", "dots", "joint", "self_distilled", "internalised")
VALIDATION_ROWS = 400
BATCH = 32
IGNORED = -100
REMOVAL = (0.3, 0.8)
"""The share of all steps at which the removal of rationale tokens begins and ends."""
REPLAYED = 0.25
"""The share of rows that keep a random number of tokens that were already removed."""
EXTRA = 4.0
"""Rate of the exponential number of tokens that are removed beyond the schedule, as in the published code."""


@dataclass(frozen=True)
class Row:
    """The token ids of one row; `steps` are the sentences of the rationale."""

    prompt: list[int]
    answer: list[int]
    steps: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, with [B, T] labels of the answer and of the rationale."""

    ids: Tensor
    mask: Tensor
    answers: Tensor
    rationales: Tensor
    before_answer: Tensor
    """[B] position whose next token is the answer's first."""


class Rows:
    """Training and validation rows of one number of operations, and the tokenizer that is trained on them."""

    def __init__(self, config: Any, operations: int, count: int) -> None:
        spec = f"gen:arithmetic?rows={count + VALIDATION_ROWS}&seed=0&steps={operations}&largest=20"
        samples = generate(spec, "train")[1]
        self.tokenizer = build_tokenizer(config.student, samples[:count])
        self.marker = self._ids(" " + config.layout.answer_marker)
        self.dot = self._ids(" .")
        rows = []
        with progress("tokenise", total=len(samples), unit="rows") as bar:
            for sample in samples:
                rows.append(self._row(sample))
                bar.advance()
        self.train, self.validation = rows[:count], rows[count:]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _row(self, sample: ReasoningSample) -> Row:
        stop = self.tokenizer.convert_tokens_to_ids(STOP_TOKEN)
        steps = [self._ids(f" {step}.") for step in sample.rationales[0].rstrip(".").split(". ")]
        return Row(self._ids(f"{sample.question} ###"), [*self._ids(" " + sample.answer), stop], steps)

    def answering(self, row: Row, dots: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """(given, rationale before the answer, answer, rationale after it) of a row that is answered at once."""
        after = [*(token for step in row.steps for token in step), self.tokenizer.eos_token_id]
        return row.prompt + self.dot * dots, [], row.answer, after

    def thinking(
        self, row: Row, *, skipped: int = 0, all_steps: bool = True
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """The same for a row that thinks first, without the first `skipped` tokens of its rationale.

        `all_steps=False` leaves out the last operation and the sentence that states the result.
        """
        steps = row.steps if all_steps else row.steps[:-2]
        thought = [token for step in steps for token in step][skipped:]
        return row.prompt, thought if all_steps else thought + self.marker, row.answer, []


def batch_of(parts: list[tuple[list[int], list[int], list[int], list[int]]], pad: int) -> Batch:
    """Pad sequences of (given, rationale, answer, rationale) and mark what each token is."""
    longest = max(sum(map(len, part)) for part in parts)
    shape = (len(parts), longest)
    ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    answers, rationales = torch.full(shape, IGNORED), torch.full(shape, IGNORED)
    before = []
    for index, (given, thought, answer, after) in enumerate(parts):
        tokens = torch.tensor(given + thought + answer + after)
        ids[index, : len(tokens)], mask[index, : len(tokens)] = tokens, 1
        start = len(given) + len(thought)
        end = start + len(answer)
        answers[index, start:end] = tokens[start:end]
        rationales[index, len(given) : start] = tokens[len(given) : start]
        rationales[index, end : len(tokens)] = tokens[end:]
        before.append(start - 1)
    return Batch(ids, mask, answers, rationales, torch.tensor(before))


def mean_nll(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens; zero without any."""
    wanted = labels_BT[:, 1:] != IGNORED
    if not wanted.any():
        return logits_BTV.sum() * 0
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1][wanted], labels_BT[:, 1:][wanted])


def states_before(output: Any, batch: Batch) -> Tensor:
    """[L, B, D] hidden states of all layers where the answer begins."""
    rows = torch.arange(len(batch.before_answer))
    return torch.stack([layer[rows, batch.before_answer] for layer in output.hidden_states[1:]])


class Pilot:
    """One variant with one seed."""

    def __init__(self, variant: str, args: argparse.Namespace, rows: Rows, config: Any) -> None:
        self.variant, self.args, self.rows = variant, args, rows
        self.dots = 0 if variant in ("post", "internalised") else args.dots
        torch.manual_seed(args.seed)
        self.model = build_model(config, rows.tokenizer)
        self.train = config.train
        self.optimizer = adamw(self.model, self.train)
        self.rng = random.Random(args.seed)
        self.whole = max(sum(map(len, row.steps)) for row in rows.train)
        self.tokens = 0

    def batches(self) -> Iterator[list[Row]]:
        """The rows of each step, in a new order every epoch."""
        left: list[Row] = []
        for _ in range(self.args.steps):
            if len(left) < BATCH:
                left = self.rng.sample(self.rows.train, len(self.rows.train))
            yield left[:BATCH]
            left = left[BATCH:]

    def loss(self, rows: list[Row], step: int) -> Tensor:
        """The loss of one step."""
        if self.variant == "internalised":
            return self._plain([self.rows.thinking(row, skipped=self._skipped(step)) for row in rows])[0]
        ties = self.variant == "self_distilled"
        loss, states = self._plain([self.rows.answering(row, self.dots) for row in rows], states=ties)
        if self.variant in ("joint", "self_distilled"):
            thought = [self.rows.thinking(row, all_steps=False) for row in rows]
            own, teacher = self._plain(thought, states=ties)
            loss = loss + own
            if states is not None and teacher is not None:
                spread = teacher.detach().std(dim=(1, 2), keepdim=True)
                loss = loss + ((states - teacher.detach()) / spread).abs().mean()
        return loss

    def _skipped(self, step: int) -> int:
        """Rationale tokens that a row of this step loses: by the clock, some more by chance, fewer when replayed."""
        begin, end = (share * self.args.steps for share in REMOVAL)
        due = int(self.whole * min(1.0, max(0.0, (step - begin) / (end - begin))))
        if 0 < due < self.whole and self.rng.random() < REPLAYED:
            return self.rng.randint(0, due)
        return due + int(self.rng.expovariate(EXTRA)) if due else 0

    def _plain(self, parts: list[Any], *, states: bool = False) -> tuple[Tensor, Tensor | None]:
        """The loss of sequences, and on request the hidden states before their answers."""
        batch = batch_of(parts, self.rows.tokenizer.pad_token_id)
        self.tokens += int(batch.mask.sum())
        output = self.model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=states)
        loss = mean_nll(output.logits, batch.answers) + mean_nll(output.logits, batch.rationales)
        return loss, states_before(output, batch) if states else None

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """(accuracy, nats per answer token) on the validation rows, answered without a rationale.

        A greedy decoder writes the gold answer if and only if each of its tokens is the most probable one.
        """
        self.model.eval()
        right, nll, count = 0, 0.0, 0
        for start in range(0, VALIDATION_ROWS, 100):
            parts = [self.rows.answering(row, self.dots)[:3] for row in self.rows.validation[start : start + 100]]
            batch = batch_of([(*part, []) for part in parts], self.rows.tokenizer.pad_token_id)
            logits = self.model(input_ids=batch.ids, attention_mask=batch.mask).logits
            wanted = batch.answers[:, 1:] != IGNORED
            right += int(((logits[:, :-1].argmax(-1) == batch.answers[:, 1:]) | ~wanted).all(1).sum())
            nll += float(mean_nll(logits, batch.answers)) * int(wanted.sum())
            count += int(wanted.sum())
        self.model.train()
        return right / VALIDATION_ROWS, nll / count

    def run(self) -> dict[str, Any]:
        """Train, printing each validation, and return what was measured."""
        steps, started, curve = self.args.steps, time.process_time(), []
        schedule = get_cosine_schedule_with_warmup(self.optimizer, round(self.train.warmup_ratio * steps), steps)
        self.model.train()
        with progress(self.variant, total=steps, unit="steps") as bar:
            for step, rows in enumerate(self.batches(), start=1):
                loss = self.loss(rows, step)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm)
                self.optimizer.step()
                schedule.step()
                self.optimizer.zero_grad()
                bar.advance(note=f"loss {loss.item():.3f}")
                if step % max(1, steps // 8) == 0 or step == steps:
                    accuracy, nll = self.validate()
                    curve.append({"step": step, "accuracy": accuracy, "nll": nll, "loss": loss.item()})
                    shown = f"{step:6} {100 * accuracy:10.1f} {nll:8.3f} {loss.item():8.3f}"
                    print(f"{self.variant:15} {shown}", flush=True)
        settings = {"variant": self.variant, "dots": self.dots, "seed": self.args.seed}
        return settings | {"curve": curve, "tokens": self.tokens, "cpu_seconds": time.process_time() - started}


def main() -> None:
    """Run the variants in turn and print their validations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)} (default: all)")
    defaults = {"operations": 3, "rows": 40000, "steps": 1100, "dots": 3, "seed": 0, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write JSON")
    args = parser.parse_args()
    for unknown in (variant for variant in args.variants if variant not in VARIANTS):
        parser.error(f"unknown variant {unknown}: choose from {', '.join(VARIANTS)}")
    if args.rows < BATCH or args.steps < 1 or args.dots < 1:
        parser.error(f"--rows must be at least {BATCH}, --steps and --dots at least 1")
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    config = load_config("demo", ["arms=[]", "arm=post_thinking", "task=arithmetic", "student.fresh.vocab_size=600"])
    rows = Rows(config, args.operations, args.rows)
    print(f"{'variant':15} {'step':>6} {'accuracy %':>10} {'nats':>8} {'loss':>8}")
    found = [Pilot(variant, args, rows, config).run() for variant in args.variants or VARIANTS]
    if args.output:
        settings = {name: getattr(args, name) for name in defaults}
        write_json(args.output, {"settings": settings, "runs": found, "machine": machine(torch.device("cpu"))})


if __name__ == "__main__":
    main()
