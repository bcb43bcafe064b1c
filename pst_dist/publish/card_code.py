"""The Python code in a model card. It uses plain transformers; this project's tests run it exactly as printed."""

from __future__ import annotations

from pst_dist.arms import ARMS
from pst_dist.evaluation.adaptive import chosen_threshold
from pst_dist.publish.card_facts import CardFacts

FOLDER, BASE = "path/to/this/folder", "path/to/the/base/model"


def prompt_text(facts: CardFacts) -> str:
    """The prompt around `{question}`, including the semantic token if a causal student expects it there."""
    text = facts.format.render("{question}")
    if facts.format.semantic_before and not facts.seq2seq:
        text += facts.format.semantic_token * facts.format.semantic_tokens
    return text


def answer_code(facts: CardFacts) -> str:
    """Code that asks a question with plain transformers and stops after the answer."""
    fmt = facts.format
    family = "AutoModelForSeq2SeqLM" if facts.seq2seq else "AutoModelForCausalLM"
    lines = [
        "import torch",
        *(["from peft import PeftModel"] if facts.is_adapter else []),
        f"from transformers import {family}, AutoTokenizer{', GenerationConfig' if facts.is_adapter else ''}",
        "",
        f'folder = "{FOLDER}"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *(_adapter_lines(facts, family) if facts.is_adapter else [f"model = {family}.from_pretrained(folder)"]),
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


def _adapter_lines(facts: CardFacts, family: str) -> list[str]:
    rows = facts.model.get_input_embeddings().weight.shape[0]
    return [
        f'base = {family}.from_pretrained("{facts.base_model or BASE}")',
        f"base.resize_token_embeddings({rows}, mean_resizing=False)",
        "model = PeftModel.from_pretrained(base, folder).eval()",
        "model.generation_config = base.generation_config = GenerationConfig.from_pretrained(folder)",
    ]


def rationale_code(facts: CardFacts) -> str | None:
    """Code that continues `answer_code` to get the rationale; None if the student has none."""
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
    lines = ["# Continue after the answer's stop token, up to the end of the text."]
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


def thinking_code(facts: CardFacts) -> str | None:
    """Code that continues `answer_code` with a second answer if the first is unsure; None without a threshold."""
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
