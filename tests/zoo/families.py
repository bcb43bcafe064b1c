"""Tiny random models whose tokenizers and configs have the peculiarities of the public families, made in a second each.

`make(name, folder)` writes one; FAMILIES names them all. What sets a family apart is in its builder's docstring. The
tokenizers are trained on CORPUS, so that words have tokens of several characters.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "What is 10 + 7? ###",
    "Say 140 ###",
    "How many apples are left when nine of them are eaten? ###",
    " two and three make five, and ten and seven make seventeen.",
    " The answer is said as it was asked for -->",
    "Question: which of them is it?\nAnswer: the second one.",
)
SPACE = "\u2581"
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDTH, "num_key_value_heads": 2, "max_position_embeddings": 256}

Made = tuple[Any, Tokenizer, dict[str, Any]]
"""A model, its tokenizer's core, and what stands in its tokenizer_config.json."""
FAMILIES: dict[str, Callable[[], Made]] = {}


def _family(build: Callable[[], Made]) -> Callable[[], Made]:
    FAMILIES[build.__name__] = build
    return build


def byte_tokenizer(special: list[str], *, words: str | None = None) -> Tokenizer:
    """Byte-level BPE, as GPT-2 has it, or with words cut by a pattern of its own."""
    core = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    core.pre_tokenizer = (
        byte_level
        if words is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), behavior="isolated"), byte_level])
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def _pieces(special: list[str], *, prefix: bool = True) -> Tokenizer:
    """SentencePiece's BPE as converted: spaces are a letter, unknown characters fall back to bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=special, show_progress=False, max_token_length=7)
    core.train_from_iterator(CORPUS, trainer)
    # Bytes are ordinary vocabulary, not special tokens, so the trainer cannot be asked for them.
    state = json.loads(core.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    core = Tokenizer.from_str(json.dumps(state))
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return core


def surrounded(core: Tokenizer, *, first: str = "", last: str = "") -> Tokenizer:
    used = [token for token in (first, last) if token]
    template = " ".join(part for part in (first, "$A", last) if part)
    pairs = [(token, core.token_to_id(token)) for token in dict.fromkeys(used)]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return core


@_family
def gpt2() -> Made:
    """No BOS, no padding token; end, beginning and unknown are one token; positions are learnt."""
    core = byte_tokenizer(["<|endoftext|>"])
    size = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=core.get_vocab_size(), bos_token_id=0, eos_token_id=0, **size)
    )
    end = "<|endoftext|>"
    return model, core, {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "unk_token": end}


@_family
def llama3() -> Made:
    """A BOS before every text, two end tokens, sampling in its generation config, tied embeddings, no padding token."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    core = surrounded(
        byte_tokenizer(special, words=r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), first=special[0]
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=core.get_vocab_size(), tie_word_embeddings=True, bos_token_id=0, eos_token_id=[1, 2], **GROUPED
        )
    )
    model.generation_config = transformers.GenerationConfig(eos_token_id=[1, 2], do_sample=True, temperature=0.6)
    return model, core, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[2]}


@_family
def llama2() -> Made:
    """SentencePiece with a space put before every text, a BOS, byte fallback, untied embeddings."""
    core = surrounded(_pieces(["<unk>", "<s>", "</s>"]), first="<s>")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=core.get_vocab_size(), tie_word_embeddings=False, **GROUPED)
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return model, core, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **tokens}


@_family
def mistral() -> Made:
    """As llama2, with attention that sees a window only."""
    _, core, settings = llama2()
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(vocab_size=core.get_vocab_size(), sliding_window=16, **GROUPED)
    )
    return model, core, {**settings, "legacy": True}


@_family
def qwen() -> Made:
    """Padding and end differ, spare rows in the embeddings, tokens that are added but not special."""
    core = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=core.get_vocab_size() + 70, head_dim=8, tie_word_embeddings=True, eos_token_id=2, **GROUPED
        )
    )
    return model, core, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def gemma_model(vocabulary: int, **settings: Any) -> Any:
    """A Gemma 2 with random weights."""
    shape = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, **GROUPED, **settings}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(vocab_size=vocabulary, **shape))


@_family
def gemma() -> Made:
    """A BOS without which it writes nonsense, no space before a text, embeddings scaled by the width."""
    core = surrounded(_pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"], prefix=False), first="<bos>")
    model = gemma_model(core.get_vocab_size())
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return model, core, {"tokenizer_class": "GemmaTokenizer", **tokens}


@_family
def opt() -> Made:
    """BOS, end and unknown are one token; learnt positions count from two."""
    core = surrounded(byte_tokenizer(["<s>", "<pad>", "</s>", "<unk>"]), first="</s>")
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=core.get_vocab_size(),
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=32,
        )
    )
    tokens = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    return model, core, {"tokenizer_class": "GPT2Tokenizer", **tokens}


@_family
def neox() -> Made:
    """Runs of spaces are added tokens; a padding token that nothing names."""
    core = byte_tokenizer(["<|endoftext|>", "<|padding|>"])
    core.add_tokens([AddedToken(" " * count, normalized=True) for count in range(8, 2, -1)])
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=core.get_vocab_size() + 9, bos_token_id=0, eos_token_id=0, max_position_embeddings=256, **WIDTH
        )
    )
    end = "<|endoftext|>"
    return model, core, {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": end, "eos_token": end, "unk_token": end}


@_family
def t5() -> Made:
    """Encoder-decoder over a unigram vocabulary that holds its control tokens as ordinary pieces."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    core.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    letters = [*map(chr, range(33, 127))]
    trainer = trainers.UnigramTrainer(
        vocab_size=220,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(f"<extra_id_{number}>", special=True) for number in range(8)])
    surrounded(core, last="</s>")
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=core.get_vocab_size(),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return model, core, {"tokenizer_class": "T5Tokenizer", "extra_ids": 8, **tokens}


@_family
def bart() -> Made:
    """Encoder-decoder that begins and ends every text with a token, with beam search in its generation config."""
    core = byte_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=core.get_vocab_size(),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=256,
        )
    )
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=2,
        pad_token_id=1,
        decoder_start_token_id=2,
        forced_bos_token_id=0,
        num_beams=3,
        early_stopping=True,
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return model, core, {"tokenizer_class": "BartTokenizer", **tokens, "cls_token": "<s>", "sep_token": "</s>"}


CAUSAL = tuple(name for name in FAMILIES if name not in ("t5", "bart"))


@functools.cache
def _made(name: str) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[name]()


def make(name: str, folder: Path) -> Path:
    """Write the family's model and tokenizer into `folder`, as its publisher would have, and return the folder."""
    model, core, settings = _made(name)
    tokens = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **tokens)
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings, indent=1))
    return folder
