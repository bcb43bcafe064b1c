"""The student's tokenizer: its own, or one trained on the training rows, with our two special tokens added.

A fresh tokenizer is a pure function of the training texts and its settings, so every arm over the same rows has
the same one, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pst_dist.arms import SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.config.schema import StudentConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.tasks import Task
from pst_dist.errors import ConfigError
from pst_dist.models.load import load_tokenizer
from pst_dist.models.locate import locate_model
from pst_dist.student.text_ids import TextIds
from pst_dist.student.warm_start import warm_shape, warm_tokenizer

END, PADDING = "<|endoftext|>", "<|pad|>"


def build_tokenizer(settings: StudentConfig, samples: Iterable[ReasoningSample]) -> Any:
    """The tokenizer of the named model, or a fresh one trained on the samples; holds our special tokens.

    Raises InputError or EnvironmentFault when a named one cannot be loaded and ConfigError when it has no
    end-of-sequence token or no room for ours.
    """
    if settings.model_name_or_path is None:
        tokenizer = _train(settings, samples)
    elif warm_shape(settings) is not None:
        tokenizer = warm_tokenizer(settings)
    else:
        tokenizer = load_tokenizer(locate_model(settings.model_name_or_path, settings.revision))
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer: Any) -> Any:
    """Add the answer-stop and the semantic token, each one id; checks that the tokenizer keeps them whole."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token", "set eos_token in its tokenizer_config.json")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [STOP_TOKEN, SEMANTIC_TOKEN]}, replace_extra_special_tokens=False
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for token in (STOP_TOKEN, SEMANTIC_TOKEN):
        ids = tokenizer("a" + token + "b", add_special_tokens=False)["input_ids"]
        wanted = tokenizer.convert_tokens_to_ids(token)
        if wanted is None or wanted == tokenizer.unk_token_id or ids.count(wanted) != 1:
            raise ConfigError(
                f"the tokenizer has no room for the special token {token}",
                "use a tokenizer to which tokens can be added (tokenizer.json of a fast one)",
            )
    return tokenizer


def check_prompt_ending(tokenizer: Any, *, is_encoder_decoder: bool) -> None:
    """A causal student's prompt must not end with the end-of-sequence token; raises ConfigError."""
    ids = tokenizer("a")["input_ids"]
    if not is_encoder_decoder and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        raise ConfigError(
            "the tokenizer ends every text with its end-of-sequence token, after which nothing can be answered",
            "set add_eos_token to false in its tokenizer_config.json",
        )


def check_marker(tokenizer: Any, marker: str) -> None:
    """The marker before an answer must come back from its tokens, or no answer could be found; raises ConfigError."""
    ids = TextIds(tokenizer).text(f"a{marker} a")
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if marker.strip() not in text:
        raise ConfigError(
            f"this tokenizer reads layout.answer_marker {marker!r} back as {text[1:-1].strip()!r}",
            'choose one that it can write, such as " -->"',
        )


def unwritable_answers(text_ids: TextIds, samples: Iterable[ReasoningSample], task: Task) -> list[ReasoningSample]:
    """The samples whose answer does not survive the way to tokens and back, so that it is never scored right."""
    lost = []
    for sample in samples:
        ids = text_ids.text(" " + sample.answer)
        text = text_ids.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not task.is_correct(task.cleanse(text), sample.answer):
            lost.append(sample)
    return lost


def _train(settings: StudentConfig, samples: Iterable[ReasoningSample]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fresh = settings.fresh
    core = Tokenizer(models.BPE())
    # Single digits and bytes: a small student sees place values and spelling, which merges would hide.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 2 if fresh.tokenizer == "byte" else fresh.vocab_size,
        special_tokens=[END, PADDING],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    texts = (
        text
        for sample in samples
        for text in (f"{sample.question} ###", f" {sample.answer}", *(f" {r} -->" for r in sample.rationales))
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PADDING, clean_up_tokenization_spaces=False
    )
