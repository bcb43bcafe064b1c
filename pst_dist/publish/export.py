"""Exports the finished student as a plain Hugging Face folder that any program loads; it stops after the answer.

Using the export does not need this package. The answer stop token is in `generation_config.eos_token_id`, the prompt
in the tokenizer's chat template, and everything else a reader must know in the model card (`model_card`). The
alignment head, which only training needs, is not exported.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import Turns
from pst_dist.errors import PstError
from pst_dist.evaluation.adaptive import chosen_threshold
from pst_dist.evaluation.evaluate import evaluations_of
from pst_dist.evaluation.records import read_training
from pst_dist.publish.card_facts import CardFacts
from pst_dist.publish.model_card import model_card
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import (
    Manifest,
    digest_of,
    write_json,
)
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.chat import NEXT, REPLY, SYSTEM
from pst_dist.student.contexts import max_positions
from pst_dist.student.finite import refuse_non_finite
from pst_dist.student.layout import Layout
from pst_dist.student.saved import FORMAT_FILE, LoadedStudent, answer_generation_config, load_student

log = logging.getLogger(__name__)
_VERSION = 4
_PROBES = ("How many are 2 and 3?", '  "Quoted", {braces} {{ x }}\nand a second line  ')


def export(config: Config, *, rebuild: bool = False, licence: str | None = None) -> Path:
    """Write `run.export` and return its path; does nothing when the same export already exists.

    `licence` is the identifier that the card names, such as `apache-2.0`; None keeps that of an earlier export.
    The model card contains every finished evaluation of exactly this student. Raises InputError when there is no
    student, and DivergedError when one of its weights is not finite.
    """
    run = run_dir(config)
    student = load_student(run.best, device="cpu")
    evaluations = evaluations_of(run.path, student.manifest)
    chain, encoder = chain_of(run, student.manifest)
    licence = licence or _licence_of(run.export)
    fingerprint = digest_of(
        {
            "version": _VERSION,
            "student": student.manifest.digest,
            "evaluations": evaluations,
            "chain": chain,
            "task": config.task,
            "max_new_tokens": config.evaluate.max_new_tokens,
            **({"licence": licence} if licence else {}),
        }
    )
    artefact = Artefact(run.export, "export")
    if not rebuild and artefact.finished(fingerprint):
        log.info("export %s is complete, nothing to do", run.export)
        return run.export
    weights = ((f"weight {name}", value) for name, value in student.model.named_parameters())
    refuse_non_finite(weights, run.export)
    extra = {**student.manifest.extra, "student": student.manifest.digest, **chain}
    extra |= {"licence": licence} if licence else {}
    with artefact.publish(fingerprint, extra) as draft:
        student.model.generation_config = generation_settings(student, config.evaluate.max_new_tokens)
        student.model.save_pretrained(draft.path)
        write_beside_weights(draft.path, config, student, evaluations, encoder, chain, licence=licence)
    log.info("exported to %s; it loads with plain transformers", run.export)
    return run.export


def write_beside_weights(
    folder: Path,
    config: Config,
    student: LoadedStudent,
    evaluations: Any,
    encoder: Any,
    chain: dict[str, Any],
    **about: Any,
) -> None:
    """Write what a whole model and an adapter alone both have: tokenizer, answer format and model card.

    `about` are the further fields of `CardFacts`: licence, is_adapter.
    """
    prepare_tokenizer(student)
    student.tokenizer.save_pretrained(folder)
    fmt = replace(student.format, think_below=chosen_threshold(evaluations))
    write_json(folder / FORMAT_FILE, fmt.to_json())
    has_template = student.tokenizer.chat_template is not None
    facts = CardFacts(
        config, student.format, student.manifest, evaluations, encoder, chain, student.model, has_template, **about
    )
    write_text(folder / "README.md", model_card(facts))


def _licence_of(folder: Path) -> str | None:
    """The licence in the card of an earlier export; None without one."""
    with contextlib.suppress(PstError):
        manifest = Artefact(folder, "export").manifest()
        licence = manifest.extra.get("licence") if manifest is not None else None
        return licence if isinstance(licence, str) else None
    return None


def chain_of(run: RunDir, student: Manifest) -> tuple[dict[str, str | None], dict[str, Any] | None]:
    """(digests of the shards and embeddings that the student was trained from, identity of their encoder).

    Taken from the training record, because the data directory may contain newer artefacts by now. A digest is None if
    it was not recorded; the encoder is None if the embeddings in the data directory are not the recorded ones.
    """
    record = read_training(run.training)
    if record.get("fingerprint") != student.fingerprint:
        record = {}
    chain = {"shards": student.extra.get("shards"), "embeddings": record.get("embeddings")}
    today = Artefact(run.embeddings, "embeddings").manifest()
    same = today is not None and today.digest == chain["embeddings"]
    return chain, today.extra["encoder"] if today is not None and same else None


def generation_settings(student: LoadedStudent, max_new_tokens: int) -> Any:
    """Greedy decoding that ends at the answer stop and never exceeds the model's positions."""
    settings = answer_generation_config(student.model, student.tokenizer, student.format)
    settings.max_new_tokens = max_new_tokens
    positions = max_positions(student.model)
    causal = not student.model.config.is_encoder_decoder
    if causal and positions is not None and student.format.max_length + max_new_tokens > positions:
        # A limit on prompt and answer together: a long prompt shortens the answer instead of raising an error.
        settings.max_new_tokens, settings.max_length = None, positions
    if not causal and positions is not None:
        settings.max_new_tokens = min(max_new_tokens, positions - 1)  # the start token takes one position
    if not causal and student.format.semantic_before and student.format.semantic_tokens == 1:
        settings.forced_bos_token_id = student.tokenizer.convert_tokens_to_ids(student.format.semantic_token)
    return settings


def prepare_tokenizer(student: LoadedStudent) -> None:
    """Set the tokenizer's chat template and remove settings that would change the input in a plain program.

    The template is kept only if it gives exactly the token ids that the student was trained on.
    """
    tokenizer = student.tokenizer
    tokenizer.clean_up_tokenization_spaces = False
    # A causal model continues at the right edge of a batch. Only the contents of init_kwargs are written to the file.
    side = "right" if student.model.config.is_encoder_decoder else "left"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side
    # Some tokenizers return token_type_ids, and GPT-2 would add their embeddings to those of the words.
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    tokenizer.chat_template = None
    if student.model.config.is_encoder_decoder and student.format.semantic_before:
        return  # its semantic token belongs to the decoder's input, which a chat template cannot set
    # Some SentencePiece tokenizers insert a space before a text, but not after a BOS token in the template.
    for spaced in (False, True):
        template = chat_template(student, spaced=spaced)
        if all(_renders(student, template, conversation) for conversation in _conversations(student)):
            tokenizer.chat_template = template
            return
    log.warning("no chat template can reproduce the trained prompt with this tokenizer: exported without one")


def _conversations(student: LoadedStudent) -> list[Turns]:
    """Inputs for trying the template: questions, after everything else that the student's prompt can contain."""
    asked: list[Turns] = [(("user", probe),) for probe in _PROBES]
    turns = student.format.turns or {}
    if NEXT in turns:
        asked += [
            (("user", probe), ("assistant", "They are {5}."), *one) for probe, one in zip(_PROBES, asked, strict=True)
        ]
    if SYSTEM in turns:
        asked += [(("system", 'Answer with a "number".'), *one) for one in asked]
    return asked


def _renders(student: LoadedStudent, template: str, conversation: Turns) -> bool:
    """Whether the template gives exactly the ids that the student was trained on."""
    given = student.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in conversation],
        chat_template=template,
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    asked = conversation if student.format.turns is not None else conversation[-1][1]
    return list(given) == expected_prompt(student, asked)


def expected_prompt(student: LoadedStudent, question: str | Turns) -> list[int]:
    """The token ids before the answer, as in training."""
    encdec = bool(student.model.config.is_encoder_decoder)
    layout = Layout(student.tokenizer, student.format, is_encoder_decoder=encdec)
    semantic = student.format.semantic_tokens if student.format.semantic_before and not encdec else 0
    return [*layout.prompt_ids(question), *[layout.semantic_id] * semantic]


def chat_template(student: LoadedStudent, *, spaced: bool = False) -> str:
    """Jinja that renders a conversation into the prompt, with the special tokens that the tokenizer adds.

    If the student's prompt has no turns, the last user message is the question and the others are left out.
    `spaced` puts a space between the special tokens and a prompt that does not begin with one.
    """
    tokenizer, fmt = student.tokenizer, student.format
    text = fmt.render("Q")
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    start = next((k for k in range(len(whole) - len(bare) + 1) if whole[k : k + len(bare)] == bare), 0)
    first = "".join(tokenizer.convert_ids_to_tokens(whole[:start]))
    last = "".join(tokenizer.convert_ids_to_tokens(whole[start + len(bare) :]))
    before, after = fmt.render("\0").split("\0")
    if fmt.semantic_before:
        after += fmt.semantic_token * fmt.semantic_tokens
    gap = "(' ' if prompt[:1] != ' ' else '')" if spaced else "''"
    if fmt.turns is None:
        made = (
            "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
            "{%- set content = users[-1]['content'] -%}"
            f"{_TEXT_OF_PARTS}"
            f"{{%- set prompt = {_quoted(before)} + content + {_quoted(after + last)} -%}}"
        )
    else:
        made = _conversation_template(fmt, fmt.turns, after + last)
    return f"{made}{{{{- {_quoted(first)} + {gap} + prompt -}}}}"


_TEXT_OF_PARTS = (
    "{%- if content is not string -%}"
    "{%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
    "{%- endif -%}"
)


def _conversation_template(fmt: AnswerFormat, turns: Mapping[str, str], end: str) -> str:
    """Jinja that sets `prompt` to the texts around the messages; it raises for those that the student cannot read."""
    head = fmt.prompt.partition("{question}")[0]
    prefix = ARMS[fmt.arm].asked[0].prefix
    refuse = "{{{{- raise_exception({!r}) -}}}}".format
    system, reply, following = (turns.get(key) for key in (SYSTEM, REPLY, NEXT))
    before, _, behind = (system or "").partition("{system}")
    with_system = (
        f"{{%- set chat.prompt = {_quoted(before)} + content + {_quoted(behind)} -%}}"
        if system is not None
        else refuse("This student takes no system message.")
    )
    with_reply = (
        f"{{%- set chat.prompt = chat.prompt + {_quoted(reply)} + content + {_quoted(following)} -%}}"
        if reply is not None and following is not None
        else refuse("This student takes no earlier messages.")
    )
    return (
        f"{{%- set chat = namespace(prompt={_quoted(head)}, turn='user') -%}}"
        "{%- for message in messages -%}"
        "{%- set content = message['content'] -%}"
        f"{_TEXT_OF_PARTS}"
        f"{{%- if loop.first and message['role'] == 'system' -%}}{with_system}"
        f"{{%- elif message['role'] != chat.turn -%}}{refuse('User and assistant messages must alternate.')}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{with_reply}{{%- set chat.turn = 'user' -%}}"
        "{%- else -%}"
        f"{{%- set chat.prompt = chat.prompt + ({_quoted(prefix)} if loop.last else '') + content -%}}"
        "{%- set chat.turn = 'assistant' -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- if chat.turn == 'user' -%}}{refuse('The last message must be from the user.')}{{%- endif -%}}"
        f"{{%- set prompt = chat.prompt + {_quoted(end)} -%}}"
    )


def _quoted(text: str) -> str:
    """A Jinja string literal. Jinja has no surrogate pairs, so non-ASCII characters are not escaped."""
    return json.dumps(text, ensure_ascii=False)
