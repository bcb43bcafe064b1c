"""The student: any causal or encoder-decoder Hugging Face model, plus the alignment head beside it.

The language-model head runs on supervised positions only (a twentieth of all, in PST), through the model's own
forward: a hook on the head's input keeps the rows that carry a loss. So tied weights, biases, scaled or capped
logits, LoRA and ZeRO-3's gathering all work as the model's authors wrote them. The alignment head lives outside
the Hugging Face module tree and never reaches an export.
"""

# Shapes in this file: B sequences, T tokens, D student width, N supervised tokens, A aligned spans, E teacher width

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.config import Config, FreshConfig, LossConfig, StudentConfig
from pst_dist.data import PSTBatch
from pst_dist.errors import ConfigError
from pst_dist.loss import PSTLossOutput, alignment_distance, token_nll
from pst_dist.tokenizer import cannot_load

HEAD_FILE = "alignment_head.safetensors"


class Student(nn.Module):
    """`forward(batch)` -> sums of the three loss terms; `model` alone is what is exported.

    Call it inside the engine's forward, never its parts: ZeRO-3 gathers weights in module hooks.
    """

    def __init__(self, model: Any, loss: LossConfig, teacher_width: int | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        # No bias: the cosine then does not depend on the scale in which a model hands over its hidden states.
        self.head = nn.Linear(hidden_width(model), teacher_width, bias=False) if teacher_width else None
        self._rows: Tensor | None = None
        self._hidden: Tensor | None = None
        self._answers: Tensor | None = None
        self.watch_gradients = False
        self.squared_gradients = torch.zeros(3, dtype=torch.float64)
        """Sums of squared gradients at the hidden state, one a term, while `watch_gradients`."""
        model.get_output_embeddings().register_forward_pre_hook(self._keep_supervised_rows)

    @property
    def decoder_start_id(self) -> int | None:
        """The token that a decoder starts with; None for a causal model."""
        return self.model.config.decoder_start_token_id if self.is_encoder_decoder else None

    def _keep_supervised_rows(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook on the language-model head: [B, T, D] in, [1, N, D] on; off while the model generates."""
        if self._rows is None:
            return None
        hidden_BTD = args[0]
        self._hidden = hidden_BTD
        rows_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[self._rows]
        self._watch(rows_ND, self._record_tokens)
        return (rows_ND[None], *args[1:])

    def forward(self, batch: PSTBatch) -> PSTLossOutput:
        """Sums over this batch; connected to every parameter even when nothing in it is supervised."""
        muted = batch.rows.numel() == 0
        self._rows = torch.zeros(1, dtype=torch.int64, device=batch.rows.device) if muted else batch.rows
        self._answers = batch.is_answer
        try:
            logits_NV = self._run(batch).logits[0]
            hidden_BTD = self._hidden
        finally:
            self._rows = self._hidden = None
        assert hidden_BTD is not None
        if muted:
            answer = rationale = logits_NV.float().sum() * 0
        else:
            nll_N = token_nll(logits_NV, batch.targets)
            answer, rationale = (nll_N * batch.is_answer).sum(), (nll_N * ~batch.is_answer).sum()
        alignment, cosine = self._alignment(hidden_BTD, batch)
        return PSTLossOutput(torch.stack([answer, rationale, alignment]), cosine)

    def _run(self, batch: PSTBatch) -> Any:
        if self.is_encoder_decoder:
            return self.model(
                input_ids=batch.encoder_input_ids,
                attention_mask=batch.encoder_attention_mask,
                decoder_input_ids=batch.input_ids,
                decoder_attention_mask=batch.attention_mask,
                use_cache=False,
            )
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def _alignment(self, hidden_BTD: Tensor, batch: PSTBatch) -> tuple[Tensor, Tensor]:
        """Sum of distances and of cosines over the batch's spans."""
        if self.head is None:
            zero = hidden_BTD.new_zeros((), dtype=torch.float32)
            return zero, zero
        if batch.span_rows.numel() == 0:
            return self.head(hidden_BTD[:1, 0]).float().sum() * 0, hidden_BTD.new_zeros((), dtype=torch.float32)
        pooled_AD = span_mean(hidden_BTD, batch.span_rows, batch.span_starts, batch.span_lengths)
        self._watch(pooled_AD, lambda grad: self._record_spans(grad, batch.span_lengths))
        distance, cosine = alignment_distance(
            self.head(pooled_AD.to(self.head.weight.dtype)),
            batch.teacher_emb,
            keys_GE=batch.keys,
            key_groups_G=batch.key_groups,
            key_index_A=batch.key_index,
            loss=self.loss,
        )
        return distance.sum(), cosine.sum()

    def _watch(self, tensor: Tensor, record: Any) -> None:
        if self.watch_gradients and tensor.requires_grad:
            tensor.register_hook(record)

    def _record_tokens(self, grad_ND: Tensor) -> None:
        squares = grad_ND.detach().double().square().sum(-1).cpu()
        if self._answers is None or len(squares) != len(self._answers):
            return
        answers = self._answers.cpu()
        self.squared_gradients[0] += squares[answers].sum()
        self.squared_gradients[1] += squares[~answers].sum()

    def _record_spans(self, grad_AD: Tensor, lengths: Tensor) -> None:
        # Each token of a span receives grad / length: length times its square is square / length.
        self.squared_gradients[2] += (grad_AD.detach().double().square().sum(-1) / lengths).sum().cpu()


def span_mean(hidden_BTD: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """[A, D] float32 means of ragged spans; positions outside every span are never read."""
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
    first = torch.cumsum(lengths, 0) - lengths
    positions = torch.arange(len(owner), device=rows.device) - first[owner] + starts[owner]
    picked = hidden_BTD[rows[owner], positions].float()
    sums = picked.new_zeros(len(rows), picked.shape[-1]).index_add_(0, owner, picked)
    return sums / lengths[:, None]


def hidden_width(model: Any) -> int:
    """Width of the hidden state that the language-model head reads."""
    return model.get_output_embeddings().weight.shape[-1] or model.config.hidden_size


def build_student(config: Config, tokenizer: Any, teacher_width: int | None) -> Student:
    """A student with its weights: from a hub id or folder, or fresh from random ones.

    The seed of the global generator must be set by the caller. Raises InputError or EnvironmentFault when the
    model cannot be loaded.
    """
    settings = config.student
    if settings.model_name_or_path is None:
        model = fresh_model(
            settings.fresh,
            tokenizer,
            max_length=config.layout.max_length,
            attn_implementation=settings.attn_implementation,
        )
    else:
        model = _pretrained_model(settings.model_name_or_path, settings)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            # A multiple of 64 keeps the head's matrix products on the fast path of tensor cores.
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.pad_token_id = tokenizer.pad_token_id
    return Student(model, config.loss, teacher_width)


def fresh_model(
    fresh: FreshConfig, tokenizer: Any, *, max_length: int, attn_implementation: str | None = None
) -> Any:
    """A randomly initialised model of the given shape; positions for max_length tokens and an answer beyond."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    vocabulary = -(-len(tokenizer) // 8) * 8
    ends: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if attn_implementation is not None:
        ends["attn_implementation"] = attn_implementation
    if fresh.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=max_length,
                n_embd=fresh.hidden_size,
                n_layer=fresh.num_layers,
                n_head=fresh.num_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ends,
            )
        )
    if fresh.architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=fresh.hidden_size,
                intermediate_size=4 * fresh.hidden_size,
                num_hidden_layers=fresh.num_layers,
                num_attention_heads=fresh.num_heads,
                max_position_embeddings=max_length,
                tie_word_embeddings=True,
                **ends,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=fresh.hidden_size,
            d_kv=fresh.hidden_size // fresh.num_heads,
            d_ff=4 * fresh.hidden_size,
            num_layers=fresh.num_layers,
            num_heads=fresh.num_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            **(ends | {"decoder_start_token_id": tokenizer.pad_token_id}),
        )
    )


def _pretrained_model(name: str, settings: StudentConfig) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    shape = pretrained_shape(name, settings.revision)
    try:
        family = AutoModelForSeq2SeqLM if shape.is_encoder_decoder else AutoModelForCausalLM
        extra = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
        return family.from_pretrained(name, revision=settings.revision, dtype=torch.float32, **extra)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # the last two: weights cut short
        raise cannot_load("the student", name, "config.json and weights", error) from error


def pretrained_shape(name: str, revision: str | None) -> Any:
    """The Hugging Face config of a model by id or folder; raises InputError or EnvironmentFault."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise cannot_load("the student", name, "config.json and weights", error) from error


def save_head(head: nn.Linear | None, weight: Tensor | None, directory: Path) -> None:
    """Write the alignment head's [E, D] weight beside a student; nothing where the arm has none."""
    if head is None or weight is None:
        return
    from safetensors.torch import save_file

    save_file({"weight": weight.float().contiguous()}, directory / HEAD_FILE)


def check_architecture(model: Any) -> None:
    """Raise ConfigError for a model without a language-model head, which could not answer."""
    if model.get_output_embeddings() is None:
        raise ConfigError(f"{type(model).__name__} has no language-model head: name a causal or seq2seq model")
