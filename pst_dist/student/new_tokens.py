"""How the tokens that we add to a pretrained model start: as the mean of all, or as a copy of a token it knows.

transformers starts an added token at the mean of the embeddings, which an untrained model with tied embeddings gives a
loss of about 20 nats as the end of an answer. A copy of a token that ends a text or a line costs far less; the
measurements are in benchmarks/README.md. A copy competes with its source wherever the source is written, so decoding
does not accept the stop before the answer (`student.generate`).
"""

from __future__ import annotations

from typing import Any

import torch

from pst_dist.arms import ARMS, SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError
from pst_dist.student.holding import WHOLE, Holding
from pst_dist.student.prompt import AUTO, is_pretrained

MEAN, END, NEWLINE = "mean", "eos", "newline"


def token_start(config: Config, tokenizer: Any) -> str:
    """`student.new_token_init` with `auto` replaced.

    `mean` for fresh students and encoders, which have rules of their own. Else `auto` is `newline`, or `eos` for an arm
    that writes a rationale before the answer (a rationale may hold newlines) and for a tokenizer without a newline.
    Raises ConfigError for a text that is not one token.
    """
    start = config.student.new_token_init
    if not is_pretrained(config):
        if start not in (AUTO, MEAN):
            raise ConfigError(
                f"student.new_token_init={start!r} needs a pretrained language model", "leave it out for this student"
            )
        return MEAN
    if start == AUTO:
        thinks = any(asked.thinks_first for asked in ARMS[config.arm].asked)
        return END if thinks or _token_of(tokenizer, NEWLINE) is None else NEWLINE
    if start != MEAN:
        source_id(tokenizer, start)
    return start


def source_id(tokenizer: Any, start: str) -> int:
    """Id of the token that `start` names: `eos`, `newline`, or its text; raises ConfigError for any other text."""
    found = _token_of(tokenizer, start)
    if found is None:
        raise ConfigError(
            f"student.new_token_init={start!r} is not one token of this tokenizer",
            "give the text of one token, or mean, eos or newline",
        )
    return found


def _token_of(tokenizer: Any, start: str) -> int | None:
    if start == END:
        return tokenizer.eos_token_id
    text = "\n" if start == NEWLINE else start
    known = tokenizer.get_vocab().get(text)
    if known is not None:
        return int(known)
    # SentencePiece puts a space before a text, so a text is also looked for behind a letter.
    alone, letter, behind = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, "a", f"a{text}"))
    for ids in (alone, behind[len(letter) :] if behind[: len(letter)] == letter else []):
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            continue
        if text in tokenizer.decode(ids, clean_up_tokenization_spaces=False):
            return int(ids[0])
    return None


def start_new_tokens(model: Any, tokenizer: Any, start: str, holding: Holding = WHOLE) -> None:
    """Copy the rows of the token that `start` names to our two tokens, in place; nothing for `mean`.

    Call it after the embeddings have been resized. The stop token gets the input row, the output row and the output
    bias. The semantic token is only given to the model and never predicted, so it gets the input row alone; where input
    and output share one matrix, it keeps its own row, because a copy would take half of its source's probability.
    A token that the base knew already, such as those of an earlier student of ours, keeps its trained rows.
    """
    known = getattr(tokenizer, "known_before", ())
    if start == MEAN or {STOP_TOKEN, SEMANTIC_TOKEN} <= set(known):
        return
    source = source_id(tokenizer, start)
    stop, semantic = (tokenizer.convert_tokens_to_ids(token) for token in (STOP_TOKEN, SEMANTIC_TOKEN))
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    biases = [
        bias for bias in (getattr(outputs, "bias", None), getattr(model, "final_logits_bias", None)) if bias is not None
    ]
    with torch.no_grad(), holding.gathered([inputs.weight, outputs.weight, *biases]):
        if SEMANTIC_TOKEN not in known and outputs.weight is not inputs.weight:
            inputs.weight[semantic] = inputs.weight[source]
        if STOP_TOKEN in known:
            return
        inputs.weight[stop] = inputs.weight[source]
        if outputs.weight is not inputs.weight:
            outputs.weight[stop] = outputs.weight[source]
        for bias in biases:
            bias[..., stop] = bias[..., source]
