"""The README.md of an exported student: Hugging Face front matter, how to ask it, what it was made from and scored.

The code in it is plain transformers and is run as it stands by this project's tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pst_dist.arms import ARMS
from pst_dist.config.schema import Config
from pst_dist.evaluation.adaptive import chosen_threshold
from pst_dist.storage.manifest import Manifest
from pst_dist.student.layout import AnswerFormat, variant_of
from pst_dist.student.warm_start import MINILM, warm_shape

FOLDER = "path/to/this/folder"
_PAPER = "https://arxiv.org/abs/2404.09170"
_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
_MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"
_ARMS = {
    "answer_only": "trained on questions and answers alone",
    "pre_thinking": "trained to write a rationale first and the answer after it",
    "prefix": "trained on two tasks: the prefix `predict: ` asks for the answer, `explain: ` for the rationale",
    "post_thinking": "trained to answer first and to give the rationale after the answer",
    "adaptive": "trained to answer first and, after the prefix `think: `, to write a rationale before the answer",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells."""

    config: Config
    format: AnswerFormat
    student: Manifest
    evaluations: list[dict[str, Any]]
    """Results of this student, test first."""
    encoder: dict[str, Any] | None
    """Identity of the encoder of the teacher's rationales."""
    chain: dict[str, str | None]
    """Digests of shards and embeddings."""
    model: Any

    @property
    def seq2seq(self) -> bool:
        """Whether the student is an encoder-decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def base_model(self) -> str | None:
        """Hub id of the model it was trained from; None for a fresh one and for a folder, whose path is its owner's."""
        base = self.config.student.model_name_or_path or ""
        if base == MINILM:
            return _MINILM_ID
        return base if _HUB_ID.fullmatch(base) and not Path(base).exists() else None

    @property
    def name(self) -> str:
        """`pst-svamp-gpt2`, say."""
        return "-".join((self.format.arm, self.config.task or "reasoning", self.model.config.model_type))


def model_card(facts: CardFacts) -> str:
    """The whole README.md."""
    parts = [
        f"---\n{yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)}---",
        f"# {facts.name}",
        _summary(facts),
        "## Prompt",
        _prompt(facts),
        "## Use",
        f"```python\n{answer_code(facts)}\n```",
        _after_code(facts),
        *_rationale(facts),
        *_thinking(facts),
        "## Evaluation",
        _evaluation(facts),
        "## Made from",
        _lineage(facts),
        "## Limits",
        _limits(facts),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The card's metadata, in the hub's own keys."""
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text2text-generation" if facts.seq2seq else "text-generation",
        "tags": ["pst-dist", "reasoning", "distillation", "answer-first", facts.format.arm.replace("_", "-")],
    }
    if facts.base_model:
        matter["base_model"] = facts.base_model
    if facts.evaluations:
        matter["model-index"] = [{"name": facts.name, "results": [_index(facts, row) for row in facts.evaluations]}]
    return matter


def _index(facts: CardFacts, results: dict[str, Any]) -> dict[str, Any]:
    """One entry of the hub's model-index."""
    metrics = [
        {"type": "accuracy", "value": round(100 * results["accuracy"], 2), "name": "accuracy (%)"},
        {
            "type": "accuracy_stderr",
            "value": round(100 * results["accuracy_stderr"], 2),
            "name": "standard error of the accuracy (points)",
        },
        {
            "type": "tokens_to_answer",
            "value": round(results["tokens_to_answer"]["mean"], 2),
            "name": "mean tokens generated up to the end of the answer",
        },
    ]
    task = {"type": "text2text-generation" if facts.seq2seq else "text-generation", "name": "question answering"}
    dataset = {"name": results["task"], "type": results["task"], "split": results["split"]}
    return {"task": task, "dataset": dataset, "metrics": metrics}


def _summary(facts: CardFacts) -> str:
    size = sum(parameter.numel() for parameter in facts.model.parameters())
    first = ARMS[facts.format.arm].answers_first
    stops = (
        "It answers first and generation ends at the answer, so an answer costs no tokens but its own."
        if first
        else "Its answer comes after the rationale; generation ends at the answer."
    )
    kind = "encoder-decoder" if facts.seq2seq else "causal"
    return (
        f"A {kind} student of {size:,} parameters ({facts.model.config.model_type}), "
        f"{_training(facts)}. {stops} Post-Semantic-Thinking is described in [arXiv 2404.09170]({_PAPER}); "
        "this model was made with pst-dist, an implementation of its own, and no number of that paper is claimed."
    )


def _training(facts: CardFacts) -> str:
    """What it was trained to do; a term of the loss that was switched off is not told as if it had been there."""
    if facts.format.arm != "pst":
        return _ARMS[facts.format.arm]
    loss = facts.config.loss
    words = "trained to answer first"
    if facts.format.writes_rationale:
        words += " and to give the rationale after the answer"
    if loss.alignment_weight == 0:
        return words + ", with a semantic token that nothing is aligned with"
    what = "a semantic token's hidden state" if loss.pooling == "token" else "the mean hidden state of its rationale"
    whose = (
        "another row's teacher rationale (a control)"
        if loss.control == "shuffle_embeddings"
        else "the teacher's rationale"
    )
    return f"{words}, with {what} aligned with a sentence embedding of {whose}"


def prompt_text(facts: CardFacts) -> str:
    """The prompt around `{question}`, with the semantic token where a causal student wants it."""
    text = facts.format.render("{question}")
    if facts.format.semantic_before and not facts.seq2seq:
        text += facts.format.semantic_token * facts.format.semantic_tokens
    return text


def _prompt(facts: CardFacts) -> str:
    fmt = facts.format
    form = (
        f"`{prompt_text(facts)}` → ` answer{fmt.stop_token}`"
        if ARMS[fmt.arm].answers_first
        else f"`{prompt_text(facts)}` → ` rationale{fmt.answer_marker} answer{fmt.stop_token}`"
    )
    return (
        f"{form}\n\n`{fmt.stop_token}` is one token and stands in `eos_token_id` of generation_config.json, so "
        "transformers, vLLM, TGI and SGLang stop there by themselves. The tokenizer's chat template renders the last "
        "user message in the same way."
        + (
            f" `{fmt.semantic_token}` is the semantic token."
            if ARMS[fmt.arm].aligned and (fmt.semantic_before or fmt.writes_rationale)
            else ""
        )
    )


def answer_code(facts: CardFacts) -> str:
    """Plain transformers: ask, and stop at the answer."""
    fmt = facts.format
    family = "AutoModelForSeq2SeqLM" if facts.seq2seq else "AutoModelForCausalLM"
    lines = [
        "import torch",
        f"from transformers import {family}, AutoTokenizer",
        "",
        f'folder = "{FOLDER}"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {family}.from_pretrained(folder)",
        "",
        'question = "…"',
        f"prompt = {prompt_text(facts)!r}.replace('{{question}}', question)",
        'inputs = tokenizer(prompt, return_tensors="pt")',
    ]
    if not facts.seq2seq:
        lines += [
            "asked = model.generate(**inputs)",
            'new = asked[0, inputs["input_ids"].shape[1]:]',
        ]
    elif fmt.semantic_before:
        lines += [
            f"semantic = tokenizer.convert_tokens_to_ids({fmt.semantic_token!r})",
            f"start = torch.tensor([[model.config.decoder_start_token_id] + [semantic] * {fmt.semantic_tokens}])",
            "asked = model.generate(**inputs, decoder_input_ids=start)",
            "new = asked[0, start.shape[1]:]",
        ]
    else:
        lines += ["asked = model.generate(**inputs)", "new = asked[0, 1:]"]
    lines.append("text = tokenizer.decode(new, skip_special_tokens=True)")
    if ARMS[fmt.arm].answers_first:
        lines.append("answer = text.strip()")
    else:
        lines.append(f"rationale, _, answer = (part.strip() for part in text.partition({fmt.answer_marker.strip()!r}))")
    lines.append("print(answer)")
    return "\n".join(lines)


def _after_code(facts: CardFacts) -> str:
    if ARMS[facts.format.arm].answers_first:
        return "Nothing has to be cut off: what is generated is the answer."
    return "`rationale` holds what was written before the answer."


def _rationale(facts: CardFacts) -> list[str]:
    """The section on asking for the rationale; nothing where the arm writes none."""
    code = rationale_code(facts)
    return ["## The rationale, on request", f"```python\n{code}\n```"] if code else []


def rationale_code(facts: CardFacts) -> str | None:
    """What goes on from `answer_code` to the rationale; None where there is none to ask for."""
    fmt, arm = facts.format, ARMS[facts.format.arm]
    if not fmt.writes_rationale or not arm.needs_rationale or not arm.answers_first:
        return None
    end = "eos_token_id=tokenizer.eos_token_id"
    if arm.name == "prefix":
        first = "1:" if facts.seq2seq else 'inputs["input_ids"].shape[1]:'
        lines = [
            f"prompt = {fmt.render('{question}', other=True)!r}.replace('{{question}}', question)",
            'inputs = tokenizer(prompt, return_tensors="pt")',
            f"explained = model.generate(**inputs, {end})",
            f"print(tokenizer.decode(explained[0, {first}], skip_special_tokens=True).strip())",
        ]
        return "\n".join(lines)
    lines = ["# Go on after the answer's stop token, up to the end of the text."]
    if arm.aligned and not fmt.semantic_before:
        lines += [
            f"semantic = tokenizer.convert_tokens_to_ids({fmt.semantic_token!r})",
            f"asked = torch.cat([asked, torch.tensor([[semantic] * {fmt.semantic_tokens}])], dim=1)",
        ]
    if facts.seq2seq:
        lines.append(f"explained = model.generate(**inputs, decoder_input_ids=asked, {end})")
    else:
        lines.append(f"explained = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), {end})")
    lines.append("print(tokenizer.decode(explained[0, asked.shape[1]:], skip_special_tokens=True).strip())")
    return "\n".join(lines)


def _thinking(facts: CardFacts) -> list[str]:
    """The section on thinking first when unsure; nothing for students that learnt one way."""
    code = thinking_code(facts)
    if code is None:
        return []
    words = "The student also learnt to think first, which is for questions whose answer at once it is unsure of."
    return ["## Thinking first when unsure", words, f"```python\n{code}\n```"]


def thinking_code(facts: CardFacts) -> str | None:
    """What goes on from `answer_code` to a second answer where the first is unsure; None without a threshold."""
    fmt, threshold = facts.format, chosen_threshold(facts.evaluations)
    if threshold is None:
        return None
    start = ", decoder_input_ids=start" if facts.seq2seq and fmt.semantic_before else ""
    first = "1:" if facts.seq2seq else 'inputs["input_ids"].shape[1]:'
    lines = [
        f"scored = model.generate(**inputs{start}, output_logits=True, return_dict_in_generate=True)",
        "probability = math.exp(sum(float(step.log_softmax(-1).max()) for step in scored.logits))",
        f"if probability < {threshold}:",
        f"    prompt = {fmt.render('{question}', other=True)!r}.replace('{{question}}', question)",
        '    inputs = tokenizer(prompt, return_tensors="pt")',
        f"    new = model.generate(**inputs)[0, {first}]",
        "    text = tokenizer.decode(new, skip_special_tokens=True)",
        f"    rationale, _, answer = (part.strip() for part in text.partition({fmt.answer_marker.strip()!r}))",
        "print(answer)",
    ]
    return "\n".join(["import math", "", *lines])


def _evaluation(facts: CardFacts) -> str:
    if not facts.evaluations:
        return "Not evaluated."
    lines = [
        "| split | rows | accuracy | standard error | chance | tokens to the answer | ms to the answer |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in facts.evaluations:
        latency = row["milliseconds_to_answer"]
        cells = (
            f"{row['task']} {row['split']}",
            str(row["rows"]),
            f"{100 * row['accuracy']:.2f} %",
            f"{100 * row['accuracy_stderr']:.2f}",
            "not known" if row["chance"] is None else f"{100 * row['chance']:.1f} %",
            f"{row['tokens_to_answer']['mean']:.1f}",
            f"{latency['median']:.0f}" if latency else "not measured",
        )
        lines.append(f"| {' | '.join(cells)} |")
    devices = " and ".join(dict.fromkeys(row["device"] for row in facts.evaluations))
    # Training writes down what the validation rows gave; without any the last step is the one that is kept.
    chosen = any(facts.student.extra.get(metric) is not None for metric in ("answer_nll", "accuracy"))
    return "\n".join(lines) + (
        f"\n\nGreedy decoding on {devices}; the standard error is sqrt(p (1 - p) / n). Milliseconds are the median for "
        "one question at a time. "
        + (
            "The checkpoint was chosen on validation rows only."
            if chosen
            else "No rows were used to choose a checkpoint."
        )
    )


def _lineage(facts: CardFacts) -> str:
    config, extra = facts.config, facts.student.extra
    if config.student.model_name_or_path is not None:
        base = f"`{facts.base_model}`" if facts.base_model else "a model from a local folder"
        if warm_shape(config.student) is not None:
            base += ", an encoder, whose weights the student started from"
    else:
        bpe = config.student.fresh.tokenizer == "bpe"
        base = f"none: random weights, {'a tokenizer trained on the training rows' if bpe else 'bytes as tokens'}"
    rows = [
        ("base model", base),
        ("arm", f"`{facts.format.arm}`, seed {extra.get('seed')}, step {extra.get('step')}"),
        *([("variant", ", ".join(variant))] if (variant := variant_of(config)) else []),
        ("task", f"`{config.task or 'not named'}`"),
        ("shards", f"`{facts.chain['shards']}`" if facts.chain["shards"] else "not recorded"),
    ]
    if facts.encoder is not None and ARMS[facts.format.arm].aligned:
        rows.append(("teacher's rationales embedded by", f"`{facts.encoder['encoder']}`"))
        rows.append(("embeddings", f"`{facts.chain['embeddings']}`"))
    rows.append(("student", f"`{facts.student.digest}`"))
    head = "Digests are sha256 over the manifests of each stage; they name exactly these rows, vectors and weights."
    return head + "\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _limits(facts: CardFacts) -> str:
    scope = f"`{facts.config.task}`" if facts.config.task else "its training rows"
    longest, fmt = facts.format.max_length, facts.format
    explains = [
        "A rationale is written after the answer and explains it; it is no proof that the answer was reached that way."
    ]
    lower = ["It reads and writes small letters; of capitals it knows those that stand alone, as choices do."]
    points = [
        f"It was trained for questions like those of {scope} in the prompt above; nothing else was tested.",
        *(explains if ARMS[fmt.arm].answers_first and fmt.writes_rationale else []),
        *(lower if warm_shape(facts.config.student) is not None else []),
        "It answers every question, also those it cannot know: there is no way for it to decline.",
        f"Prompts were at most {longest} tokens in training, and so was what it writes."
        if facts.seq2seq
        else f"Prompt and everything written after it were at most {longest} tokens together in training.",
        "Its licence follows from the base model, the rows and the teacher; none is given here.",
    ]
    return "\n".join(f"- {point}" for point in points)
