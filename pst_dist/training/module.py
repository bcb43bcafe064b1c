"""The student in training: any causal or encoder-decoder Hugging Face model, plus a separate alignment head.

The language-model head runs on supervised positions only (a twentieth of all, in PST), inside its own module call,
through `kernels.head`. So tied weights, biases, LoRA and ZeRO-3's gathering work as usual. A model that caps or scales
its logits afterwards is detected, and its head runs unchanged. The alignment head is outside the Hugging Face module
tree and is never exported.
"""

# Shapes in this file: B sequences, T tokens, D student width, N supervised tokens, A aligned spans, E teacher width

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.config.schema import Config, LossConfig
from pst_dist.errors import ConfigError
from pst_dist.kernels.head import HeadOutput, combined_head, is_plain, span_tap
from pst_dist.student.holding import WHOLE, Holding, shape_of_weight
from pst_dist.student.lora import is_adapted
from pst_dist.student.pretrained import build_model
from pst_dist.student.token_rows import head_rows, rows_gradient
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.batching.kept_apart import check_kept_apart
from pst_dist.training.loss import PSTLossOutput, alignment_distance, spread_of, token_nll

log = logging.getLogger(__name__)


def check_layer(layer: int, layers: int) -> None:
    """Raise ConfigError when a student with so many layers has no such layer for `loss.layer`."""
    if layer == 0 or abs(layer) > layers:
        raise ConfigError(
            f"loss.layer={layer}: the student has layers 1 to {layers}",
            f"use one of them, or -1 to -{layers} to count from the end",
        )


class Student(nn.Module):
    """`forward(batch, scales)` -> the loss of this batch and its terms; only `model` is exported.

    Call it through the engine's forward and never call its parts: ZeRO-3 gathers weights in module hooks.
    """

    def __init__(self, model: Any, loss: LossConfig, teacher_width: int | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.is_adapted = is_adapted(model)
        """Whether this is a LoRA student: of its model, only adapters and some embedding rows are trained."""
        # No bias, so the cosine does not depend on the scale of a model's hidden states.
        self.head = nn.Linear(hidden_width(model), teacher_width, bias=False) if teacher_width else None
        self._layer = loss.layer if self.head is not None else None
        self.watch_gradients = False
        self.squared_gradients = torch.zeros(3, dtype=torch.float64)
        """Sums of squared gradients at the hidden state, one per term, while `watch_gradients` is set."""
        self.observer: Callable[[Tensor], object] | None = None
        """Called with the [A, D] hidden states that the alignment head reads, in each pass, while it is set."""
        self._fusible: bool | None = None
        self._keeps_apart = False

    @property
    def widths(self) -> tuple[int, int]:
        """Widths D and E that the alignment head maps between; (0, 0) without one."""
        return (self.head.in_features, self.head.out_features) if self.head is not None else (0, 0)

    @property
    def decoder_start_id(self) -> int | None:
        """The token that a decoder starts with; None for a causal model."""
        return self.model.config.decoder_start_token_id if self.is_encoder_decoder else None

    def forward(self, batch: PSTBatch, scales: Tensor) -> PSTLossOutput:
        """Loss and sums over this batch; the graph reaches every parameter even when nothing is supervised.

        `scales` [3] float32 multiply the terms' sums: weights over counts of the whole global batch
        (`TermWeights.scales`). They are needed here because the head computes its gradients in the forward pass.
        """
        if batch.position_ids is not None and not self._keeps_apart:
            check_kept_apart(self.model, batch.input_ids)
            self._keeps_apart = True
        if self._fusible is None:
            self._fusible = self._returns_the_heads_logits(batch)
        weights_N = torch.where(batch.is_answer, scales[0], scales[1])
        call = _HeadCall(self, batch, weights_N)
        with _replaced_forward(self.model.get_output_embeddings(), call):
            made = self._run(batch, with_layers=self._layer is not None)
        output = call.result(made.logits)
        # Multiplying by the mask would turn one term's infinite loss into a NaN in the other term.
        answer, rationale = (torch.where(which, output.nll, 0).sum() for which in (batch.is_answer, ~batch.is_answer))
        pooled = output.pooled if self._layer is None else span_tap(self._layer_of(made), batch.spans)[1]
        if self.observer is not None:
            self.observer(pooled.detach())
        alignment, cosine, spread = self._alignment(pooled, batch)
        sums = torch.stack([answer, rationale, alignment.detach()])
        return PSTLossOutput(output.loss + alignment * scales[2], sums, cosine, spread)

    @torch.no_grad()
    def _returns_the_heads_logits(self, batch: PSTBatch) -> bool:
        """Whether the model returns its head's logits unchanged, tested on one token with extreme logits.

        Raises ConfigError for a model that computes logits without its head module.
        """
        first = replace(
            batch,
            input_ids=batch.input_ids[:1, :1],
            attention_mask=torch.ones_like(batch.attention_mask[:1, :1]),
            encoder_input_ids=None if batch.encoder_input_ids is None else batch.encoder_input_ids[:1, :1],
            encoder_attention_mask=None if batch.encoder_input_ids is None else batch.attention_mask[:1, :1] * 0 + 1,
            position_ids=None,
        )
        given: list[Tensor] = []

        def answer(head: nn.Module, original: Any, hidden: Tensor) -> Tensor:
            # The range is wide enough that any cap, scale or mask changes some value.
            probe = torch.linspace(-100, 100, vocabulary_of(head, self.model), device=hidden.device).to(hidden.dtype)
            given.append(probe)
            return probe.expand(1, 1, -1)

        was_training = self.training
        self.eval()
        with _replaced_forward(self.model.get_output_embeddings(), answer):
            logits = self._run(first).logits
        self.train(was_training)
        if not given:
            raise ConfigError(
                f"{type(self.model).__name__} computes its logits without calling its output embeddings",
                "use a model whose language-model head is a module of its own",
            )
        same = logits.numel() == given[0].numel() and torch.equal(logits.flatten().float(), given[0].float())
        if not same:
            log.info("%s changes the logits of its head, so its head runs unfused", type(self.model).__name__)
        return same

    def _layer_of(self, made: Any) -> Tensor:
        """[B, T, D] output of the aligned layer; raises ConfigError when the model has no such layer."""
        states = made.decoder_hidden_states if self.is_encoder_decoder else made.hidden_states
        layers, layer = len(states) - 1, self._layer or 0  # the first state is the embedding
        check_layer(layer, layers)
        return states[layer]

    def _run(self, batch: PSTBatch, *, with_layers: bool = False) -> Any:
        more: dict[str, Any] = {"output_hidden_states": True} if with_layers else {}
        if self.is_encoder_decoder:
            return self.model(
                input_ids=batch.encoder_input_ids,
                attention_mask=batch.encoder_attention_mask,
                decoder_input_ids=batch.input_ids,
                decoder_attention_mask=batch.attention_mask,
                use_cache=False,
                **more,
            )
        if batch.position_ids is not None:
            # Without a mask, models keep apart the sequences whose positions begin anew.
            return self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **more)
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **more)

    def _alignment(self, pooled_AD: Tensor, batch: PSTBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the distances and of the cosines over the batch's spans, and `PSTLossOutput.spread`."""
        nothing_more = pooled_AD.new_zeros(0)
        if self.head is None:
            zero = pooled_AD.new_zeros(())
            return zero, zero, nothing_more
        if not len(batch.spans) and not self.loss.symmetric:
            # Still run the head: each of its parameters must get a gradient on every rank.
            nothing = self.head(pooled_AD.to(self.head.weight.dtype)).float().sum()
            return nothing, nothing.detach(), nothing_more
        if self.watch_gradients and pooled_AD.requires_grad:
            pooled_AD.register_hook(lambda grad: self._record_spans(grad, batch.spans.lengths))
        predicted_AE = self.head(pooled_AD.to(self.head.weight.dtype))
        distance, cosine = alignment_distance(
            predicted_AE,
            batch.teacher_emb,
            keys_GE=batch.keys,
            key_groups_G=batch.key_groups,
            key_index_A=batch.key_index,
            capacity=batch.capacity,
            loss=self.loss,
        )
        return distance.sum(), cosine.sum(), nothing_more if self.training else spread_of(predicted_AE, cosine)

    def _record_spans(self, grad_AD: Tensor, lengths: Tensor) -> None:
        # Each of the span's `length` tokens receives grad / length, so the sum of squares is grad squared / length.
        self.squared_gradients[2] += (grad_AD.detach().double().square().sum(-1) / lengths).sum().cpu()


class _HeadCall:
    """Replaces the language-model head's forward during one training pass and keeps its output.

    A model that returns its head's logits unchanged gets the fused head; its logits are then dummies. A model that
    changes them afterwards (caps, scales, masks) runs its own head on the supervised rows.
    """

    def __init__(self, student: Student, batch: PSTBatch, weights_N: Tensor) -> None:
        self.student, self.batch, self.weights_N = student, batch, weights_N
        self.output: HeadOutput | None = None
        self.pooled: Tensor | None = None

    def __call__(self, head: nn.Module, original: Callable[[Tensor], Tensor], hidden_BTD: Tensor) -> Tensor:
        batch, watch = self.batch, self.student.watch_gradients
        if self.student._fusible:
            rows_KD = head_rows(head) if is_plain(head) else None
            output = combined_head(
                hidden_BTD,
                head,
                batch.supervised,
                self.weights_N,
                batch.spans,
                forward=original,
                with_squares=watch,
            )
            if output.squares.numel():
                # Capture only what the hook needs: holding `output` would keep the loss, and so the graph, alive.
                squares, record = output.squares, self._recorder()
                output.loss.register_hook(lambda upstream: record(squares * upstream * upstream))
            if rows_KD is not None and torch.is_grad_enabled():
                picked_ND = hidden_BTD.detach().flatten(0, 1)[batch.supervised.rows]
                gradient_KD = rows_gradient(head, picked_ND, output.nll, batch.supervised.targets, self.weights_N)
                nothing = ((rows_KD - rows_KD.detach()).float() * gradient_KD).sum()
                output = replace(output, loss=output.loss + nothing)
            self.output = output
            return output.anchor.to(hidden_BTD.dtype).expand(1, 1, vocabulary_of(head, self.student.model))
        hidden, self.pooled = span_tap(hidden_BTD, batch.spans)
        picked = batch.supervised.rows if len(batch.supervised.rows) else batch.supervised.rows.new_zeros(1)
        rows_ND = hidden.flatten(0, 1)[picked]
        if watch and rows_ND.requires_grad and len(batch.supervised.rows):
            record = self._recorder()
            rows_ND.register_hook(lambda gradient: record(gradient.detach().float().square().sum(-1)))
        return original(rows_ND[None])

    def result(self, logits: Tensor) -> HeadOutput:
        """The head's output for the batch, given the logits that the model returned."""
        if self.output is not None:
            # Adds zero, but makes the backward pass run through the head module's output, as its hooks expect.
            return replace(self.output, loss=self.output.loss + logits.float().sum())
        assert self.pooled is not None, "the model did not call its head"
        nothing = self.pooled.new_zeros(0)
        if not len(self.batch.supervised.rows):
            return HeadOutput(logits.float().sum() * 0, nothing, self.pooled, nothing, nothing)
        nll_N = token_nll(logits[0], self.batch.supervised.targets)
        return HeadOutput((nll_N * self.weights_N).sum(), nll_N.detach(), self.pooled, nothing, nothing)

    def _recorder(self) -> Callable[[Tensor], None]:
        """A function that adds [N] squared gradients of the supervised rows to the two cross-entropies' sums."""
        answers, totals = self.batch.is_answer, self.student.squared_gradients

        def record(squares_N: Tensor) -> None:
            totals[0] += squares_N[answers].double().sum().cpu()
            totals[1] += squares_N[~answers].double().sum().cpu()

        return record


@contextlib.contextmanager
def _replaced_forward(head: nn.Module, call: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the head's forward by `call(head, its forward, hidden)`, within its hooks; restore it on exit."""
    before = head.__dict__.get("forward")
    original = head.forward
    head.forward = lambda hidden: call(head, original, hidden)
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def vocabulary_of(head: nn.Module, model: Any) -> int:
    """Number of logits a head produces per position.

    The rows of its weight, not `out_features`: transformers 5.0 leaves that unchanged when it resizes BART's tied head.
    """
    weight = getattr(head, "weight", None)
    rows = 0 if weight is None else shape_of_weight(weight)[0]
    return rows or getattr(head, "out_features", None) or model.config.get_text_config().vocab_size


def hidden_width(model: Any) -> int:
    """Width of the hidden state that the language-model head reads."""
    return shape_of_weight(model.get_output_embeddings().weight)[-1]


def build_student(config: Config, tokenizer: Any, teacher_width: int | None, holding: Holding = WHOLE) -> Student:
    """A student with its weights, held by the ranks as `holding` says; raises what `build_model` raises.

    The caller must seed the global random generator, alike on all ranks.
    """
    student = Student(build_model(config, tokenizer, holding), config.loss, teacher_width)
    holding.finish(student)
    return student
