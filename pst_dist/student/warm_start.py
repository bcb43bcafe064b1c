"""A student that starts from a BERT encoder's weights, for language tasks without an available pretrained decoder.

The encoder becomes a causal model, or both halves of an encoder-decoder with new cross attention (Rothe et al., arXiv
1907.12461), in transformers' BertGeneration classes: BERT without pooler and token types, with the tied embeddings as
head. So the export loads with stock transformers. The tokenizer is the encoder's WordPiece, adapted to write the parts
of answers: numbers with punctuation, the arrow before an answer, choice letters. Everything else stays lower-cased.
"""

from __future__ import annotations

import json
import string
from typing import Any, Literal

from pst_dist.arms import SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.config.schema import StudentConfig
from pst_dist.errors import ConfigError
from pst_dist.models.locate import MINILM, locate_encoder, locate_model

CAPITALS = string.ascii_uppercase
"""A single capital letter keeps its case: the answers of multiple choice."""
VOCABULARY_MULTIPLE = 64
"""The embedding matrix has a multiple of this many rows, which keeps the head's products on the fast path of GPUs."""
_FIRST, _LAST, _PADDING, _UNKNOWN = "[CLS]", "[SEP]", "[PAD]", "[UNK]"
# What WordPiece gets as one word, so that decoding puts no spaces inside it: 1,051.50 and 04/30/2021, a sign before
# digits, an arrow; words; any other mark by itself, as in BERT.
_WORDS = r"(?:(?<![\w)\].])-)?\d+(?:[.,:/]\d+)+|(?<![\w)\].])-\d+|[-=<>+*~|]{2,}|\w+|[^\w\s]"


def warm_shape(settings: StudentConfig) -> Literal["causal", "encoder_decoder"] | None:
    """The architecture built from a named encoder; None for a fresh student or a language model."""
    if settings.model_name_or_path is None:
        return None
    return settings.warm_start or ("causal" if settings.model_name_or_path == MINILM else None)


def warm_checkpoint(settings: StudentConfig) -> str:
    """Folder or hub id of the encoder; raises EnvironmentFault when the package of `minilm` is not installed."""
    name = str(settings.model_name_or_path)
    return str(locate_encoder(MINILM)) if name == MINILM else name


def warm_tokenizer(settings: StudentConfig) -> Any:
    """The encoder's WordPiece adapted to write answers, still without our special tokens.

    A prompt begins with [CLS]; when an encoder reads it, it ends with [SEP], the end-of-sequence token. Raises
    ConfigError when the tokenizer is not WordPiece, InputError or EnvironmentFault when it cannot be loaded.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from pst_dist.models.load import load_tokenizer

    name = warm_checkpoint(settings)
    theirs = load_tokenizer(locate_model(name, settings.revision))
    backend: Any = getattr(theirs, "backend_tokenizer", None)
    kind = json.loads(backend.to_str())["model"]["type"] if backend is not None else type(theirs).__name__
    if kind != "WordPiece":
        raise ConfigError(f"student.warm_start needs a BERT encoder, but this tokenizer is {kind}", path=name)
    core = Tokenizer.from_str(backend.to_str())
    core.no_padding()
    core.no_truncation()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    ends = [(token, core.token_to_id(token)) for token in (_FIRST, _LAST)]
    last = f" {_LAST}" if warm_shape(settings) == "encoder_decoder" else ""
    core.post_processor = processors.TemplateProcessing(single=f"{_FIRST} $A{last}", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=_FIRST,
        eos_token=_LAST,
        pad_token=_PADDING,
        unk_token=_UNKNOWN,
        model_max_length=getattr(theirs, "model_max_length", None),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(letter, single_word=True, normalized=False) for letter in CAPITALS])
    return tokenizer


def warm_model(settings: StudentConfig, tokenizer: Any, *, max_length: int) -> Any:
    """The causal or encoder-decoder model of `settings`, float32, with the encoder's weights.

    Only cross attention is drawn from the global generator. Raises ConfigError for an architecture other than BERT and
    for a `max_length` beyond its positions, InputError or EnvironmentFault when the encoder cannot be loaded.
    """
    from transformers import BertGenerationDecoder, EncoderDecoderConfig, EncoderDecoderModel

    from pst_dist.models.load import load_bare_encoder

    name = warm_checkpoint(settings)
    encoder = load_bare_encoder(locate_model(name, settings.revision))
    _check_encoder(encoder.config, max_length, name)
    weights = _widened(encoder.state_dict(), tokenizer)
    rows = len(weights["embeddings.word_embeddings.weight"])
    model: Any
    if warm_shape(settings) == "causal":
        model = BertGenerationDecoder(_config(encoder.config, rows, tokenizer, settings, is_decoder=True))
        _fill(model.bert, weights)
        return model
    configs = (
        _config(encoder.config, rows, tokenizer, settings, is_decoder=False),
        _config(encoder.config, rows, tokenizer, settings, is_decoder=True, add_cross_attention=True),
    )
    whole = EncoderDecoderConfig.from_encoder_decoder_configs(
        *configs,
        decoder_start_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Each half ties its own; transformers cannot express that both halves share one matrix.
        tie_word_embeddings=False,
    )
    model = EncoderDecoderModel(config=whole)
    _fill(model.encoder, weights)
    _fill(model.decoder.bert, weights)
    return model


def check_warm_start(settings: StudentConfig, *, max_length: int) -> None:
    """Raise the error that `warm_model` would raise for an encoder, as far as its config shows."""
    from pst_dist.models.load import load_model_config

    name = warm_checkpoint(settings)
    _check_encoder(load_model_config(locate_model(name, settings.revision)), max_length, name)


def _check_encoder(config: Any, max_length: int, name: str) -> None:
    if config.model_type != "bert" or config.is_decoder:
        raise ConfigError(f"student.warm_start needs a BERT encoder, but this is {config.model_type}", path=name)
    if max_length > config.max_position_embeddings:
        raise ConfigError(
            f"layout.max_length is {max_length}, but this encoder has {config.max_position_embeddings} positions",
            f"set layout.max_length={config.max_position_embeddings} or less",
        )


def _config(bert: Any, rows: int, tokenizer: Any, settings: StudentConfig, **role: bool) -> Any:
    from transformers import BertGenerationConfig

    same = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings"),
        *("initializer_range", "layer_norm_eps"),
    )
    extra: dict[str, Any] = {key: getattr(bert, key) for key in same}
    if settings.attn_implementation:
        extra["attn_implementation"] = settings.attn_implementation
    return BertGenerationConfig(
        vocab_size=rows,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra | role,
    )


def _widened(weights: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """BERT's weights under BertGeneration's names, with a row for each new token.

    A new row starts as a copy of the token nearest in meaning: a capital as its lower-case letter, the answer stop as
    [SEP], the semantic token as [CLS]. Punctuation attached to digits (`##.`), which never occurs in BERT's own words,
    starts as the plain mark.
    """
    import torch

    words = weights["embeddings.word_embeddings.weight"]
    rows = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    wide = torch.cat([words, words.mean(0, keepdim=True).expand(max(0, rows - len(words)), -1)]).clone()
    like = {capital: capital.lower() for capital in CAPITALS}
    like |= {f"##{mark}": mark for mark in string.punctuation} | {STOP_TOKEN: _LAST, SEMANTIC_TOKEN: _FIRST}
    known = tokenizer.get_vocab()
    for token, model in like.items():
        if token in known and known.get(model, rows) < len(words):
            wide[known[token]] = words[known[model]]
    kept = {
        key: value
        for key, value in weights.items()
        if not key.startswith(("pooler.", "embeddings.token_type_embeddings.")) and not key.endswith("position_ids")
    }
    # Every token of a single text has token type 0, so that row is added to each position.
    places = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    return kept | {"embeddings.word_embeddings.weight": wide, "embeddings.position_embeddings.weight": places}


def _fill(half: Any, weights: dict[str, Any]) -> None:
    """Copy the encoder's weights into one half; nothing but cross attention may be missing."""
    missing, unexpected = half.load_state_dict(weights, strict=False)
    left = [name for name in missing if ".crossattention." not in name]
    if left or unexpected:
        raise ConfigError(f"not the weights of a BERT encoder: {', '.join([*left, *unexpected])[:120]}")
