"""A Hugging Face tokenizer in llama.cpp's terms, or a refusal that names what llama.cpp cannot do.

llama.cpp does not read a pre-tokenizer's regex: it knows a fixed list by name (`tokenizer.ggml.pre`), and a wrong name
gives other tokens without any error. So the name is looked up here by the regex itself, and any pre-tokenizer whose
regex is not known to be the same is refused. Source: `llm_tokenizer_bpe` and `llama_vocab::impl::load` in llama.cpp's
src/llama-vocab.cpp. `engine.check_tokens` then compares real texts, because the list was read by people.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pst_dist.errors import ConfigError

_WORDS = "words"
"""GPT-2's regex, which `ByteLevel(use_regex=True)` applies."""
_DIGITS = "single digits"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = {
    ((_WORDS,), False): "gpt-2",
    ((_DIGITS, _WORDS), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
}
"""(regexes in order, whether whole words skip the merges) -> llama.cpp's name. A fresh student's is that of SmolLM."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's token types."""
_REMEDY = "serve the export with transformers (`transformers serve`), or convert it with llama.cpp's own script"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int | None
    """The token before every text; None when the tokenizer adds none."""
    eos: int
    stop: int
    """The answer stop: llama.cpp ends a generation at this token too."""
    padding: int | None
    normalises: bool = False
    """Whether the tokenizer brings text into Unicode's form NFC, which llama.cpp does not."""


def vocabulary_of(tokenizer: Any, *, rows: int, stop_token: str) -> Vocabulary:
    """The vocabulary of a tokenizer for a model with `rows` rows of embeddings.

    Raises ConfigError for a tokenizer that llama.cpp does not read in the same way.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    pre = _pre_of(core)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise _refused(f"its model has {key}={model[key]!r}")
    words = [f"[UNUSED_{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    for word, index in model["vocab"].items():
        words[index], types[index] = word, NORMAL
    for added in core["added_tokens"]:
        odd = next((key for key in ("lstrip", "rstrip", "single_word") if added.get(key)), None)
        if odd is not None:
            raise _refused(f"its token {added['content']!r} has {odd}")
        words[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if len(set(words)) != len(words):
        raise _refused("two of its tokens have the same text")
    return Vocabulary(
        pre=pre,
        tokens=words,
        types=types,
        # llama.cpp refuses an empty list, so a tokenizer of bytes gets a merge of two tokens that no text leads to.
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        or [f"{tokenizer.eos_token} {tokenizer.eos_token}"],
        bos=_added_before(tokenizer),
        eos=int(tokenizer.eos_token_id),
        stop=int(tokenizer.convert_tokens_to_ids(stop_token)),
        padding=tokenizer.pad_token_id,
        normalises=core["normalizer"] is not None,
    )


def _pre_of(core: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json; raises ConfigError for an unknown one."""
    if core["model"]["type"] != "BPE":
        raise _refused(f"its model is {core['model']['type']}; only byte-level BPE is written")
    normalizer = core["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refused(f"its normalizer is {normalizer['type']}")
    steps = core["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if [step["type"] for step in steps].count("ByteLevel") != 1 or steps[-1]["type"] != "ByteLevel":
        raise _refused("it is not byte-level (its words are not cut by ByteLevel)")
    regexes = tuple(found for step in steps if (found := _regex_of(step)) is not None)
    name = _NAMES.get((regexes, bool(core["model"].get("ignore_merges"))))
    if name is None:
        raise _refused(f"llama.cpp has no pre-tokenizer that is known to be {' then '.join(regexes)[:200]!r}")
    return name


def _regex_of(step: dict[str, Any]) -> str | None:
    """What one step of a pre-tokenizer cuts by; None for one that cuts nothing."""
    if step["type"] == "ByteLevel":
        if step["add_prefix_space"]:
            raise _refused("it puts a space before every text")
        return _WORDS if step.get("use_regex", True) else None
    if step["type"] == "Digits" and step["individual_digits"]:
        return _DIGITS
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex") or f"the text {step['pattern'].get('String')!r}"
    raise _refused(f"its pre-tokenizer has a step {step['type']} of a kind that llama.cpp has not")


def _added_before(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text; raises ConfigError when it adds others."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    if whole == bare:
        return None
    if whole[1:] != bare or whole[0] != tokenizer.bos_token_id:
        raise _refused("it adds other tokens to a text than a BOS before it")
    return int(whole[0])


def _refused(why: str) -> ConfigError:
    return ConfigError(f"this student's tokenizer cannot be written to GGUF: {why}", _REMEDY)
