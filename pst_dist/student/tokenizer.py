"""The student's tokenizer: the model's own, or one trained on the training rows, plus our two special tokens.

A fresh tokenizer is a pure function of the training texts and its settings, so all arms over the same rows have the
same one on every rank.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.arms import SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.config.schema import StudentConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.tasks import Task
from pst_dist.errors import ConfigError, PstError
from pst_dist.models.load import load_tokenizer
from pst_dist.models.locate import locate_model
from pst_dist.storage.json_files import read_object
from pst_dist.storage.manifest import digest_of, write_json
from pst_dist.student.text_ids import TextIds
from pst_dist.student.warm_start import warm_shape, warm_tokenizer

END, PADDING = "<|endoftext|>", "<|pad|>"
MOST_ROWS = 1_000_000
"""Rows that a fresh BPE tokenizer is trained on at most."""


def build_tokenizer(
    settings: StudentConfig, samples: Iterable[ReasoningSample], kept: KeptTokenizer | None = None
) -> Any:
    """The tokenizer of the named model, or a fresh one trained on the samples; includes our special tokens.

    A fresh one that is `kept` is loaded; one that was trained is kept there. Raises InputError or EnvironmentFault when
    a model's tokenizer cannot be loaded, and ConfigError when it has no end-of-sequence token or cannot take our
    tokens.
    """
    if settings.model_name_or_path is None:
        core = kept.read(settings) if kept is not None else None
        if core is None:
            core = _train(settings, samples)
            if kept is not None:
                kept.write(settings, core)
        tokenizer = _fresh(core)
    elif warm_shape(settings) is not None:
        tokenizer = warm_tokenizer(settings)
    else:
        tokenizer = load_tokenizer(locate_model(settings.model_name_or_path, settings.revision))
    return with_special_tokens(tokenizer)


@dataclass(frozen=True)
class KeptTokenizer:
    """The fresh tokenizer of a run, in a file, so that neither a restart nor another rank trains it again."""

    path: Path
    rows: str
    """Digest of the rows that it is trained on."""

    def _made_from(self, settings: StudentConfig) -> str:
        fresh = {name: getattr(settings.fresh, name) for name in ("tokenizer", "vocab_size")}
        return digest_of({"rows": self.rows, "version": importlib.metadata.version("tokenizers"), **fresh})

    def read(self, settings: StudentConfig) -> Any | None:
        """The tokenizer of the tokenizers library; None when there is none of these rows and settings."""
        from tokenizers import Tokenizer

        try:
            found = read_object(self.path)
            if found.get("made_from") != self._made_from(settings) or digest_of(found["core"]) != found.get("sha256"):
                return None
            return Tokenizer.from_str(found["core"])
        except Exception:  # the tokenizers library raises Exception itself
            return None

    def write(self, settings: StudentConfig, core: Any) -> None:
        """Keep it, where this process may write."""
        text = core.to_str()
        value = {"made_from": self._made_from(settings), "core": text, "sha256": digest_of(text)}
        with contextlib.suppress(PstError, OSError):
            write_json(self.path, value)


def with_special_tokens(tokenizer: Any) -> Any:
    """Add the answer-stop and the semantic token, and check that the tokenizer encodes each as one id."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token", "set eos_token in its tokenizer_config.json")
    # A model that was distilled here before has trained rows for our tokens (`new_tokens.start_new_tokens`).
    unknown = (None, tokenizer.unk_token_id)
    ours = (STOP_TOKEN, SEMANTIC_TOKEN)
    tokenizer.known_before = tuple(one for one in ours if tokenizer.convert_tokens_to_ids(one) not in unknown)
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
                f"the tokenizer does not accept the special token {token}",
                "use a tokenizer to which tokens can be added (a fast one with tokenizer.json)",
            )
    return tokenizer


def check_prompt_ending(tokenizer: Any, *, is_encoder_decoder: bool) -> None:
    """Raise ConfigError when a causal student's prompt would end with the end-of-sequence token."""
    ids = tokenizer("a")["input_ids"]
    if not is_encoder_decoder and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        raise ConfigError(
            "the tokenizer ends every text with its end-of-sequence token, so no answer could follow a prompt",
            "set add_eos_token to false in its tokenizer_config.json",
        )


def check_marker(tokenizer: Any, marker: str) -> None:
    """Raise ConfigError when the answer marker changes in this tokenizer, since no answer could then be found."""
    ids = TextIds(tokenizer).text(f"a{marker} a")
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if marker.strip() not in text:
        raise ConfigError(
            f"this tokenizer turns layout.answer_marker {marker!r} into {text[1:-1].strip()!r}",
            'choose one that it preserves, such as " -->"',
        )


def unwritable_answers(text_ids: TextIds, samples: Iterable[ReasoningSample], task: Task) -> list[ReasoningSample]:
    """The samples whose answer changes when encoded and decoded, so that it can never be scored correct."""
    lost = []
    for sample in samples:
        ids = text_ids.text(" " + sample.answer)
        text = text_ids.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not task.is_correct(task.cleanse(text), sample.answer):
            lost.append(sample)
    return lost


def _train(settings: StudentConfig, samples: Iterable[ReasoningSample]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    fresh = settings.fresh
    core = Tokenizer(models.BPE())
    # Single digits and bytes show a small student place values and spelling, which merges would hide.
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
    # Bytes are the alphabet, whatever the rows are.
    texts = (
        text
        for sample in (_spread(samples) if fresh.tokenizer == "bpe" else ())
        for text in (f"{sample.question} ###", f" {sample.answer}", *(f" {r} -->" for r in sample.rationales))
    )
    core.train_from_iterator(texts, trainer)
    return core


def _spread(samples: Iterable[ReasoningSample]) -> Iterable[ReasoningSample]:
    """At most `MOST_ROWS` of the samples, evenly spread; more would take minutes and hardly change a merge."""
    if not isinstance(samples, Sequence) or len(samples) <= MOST_ROWS:
        return samples
    return (samples[index] for index in range(0, len(samples), -(-len(samples) // MOST_ROWS)))


def _fresh(core: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PADDING, clean_up_tokenization_spaces=False
    )
