"""The memory that training needs: what a rank holds on its device, and what its process holds in host memory.

Arithmetic on shapes, without torch. The activations of a layer are counted tensor by tensor, as autograd saves them in
transformers' implementations; `tests/training/test_memory.py` compares them with the tensors that are really saved.
"""

# Letters in this file: P parameters (the student's and the alignment head's), N ranks, D width, T tokens of a row

from __future__ import annotations

from dataclasses import dataclass

from pst_dist.config.schema import Config
from pst_dist.config.zero import zero_section, zero_stage
from pst_dist.models.locate import is_gguf
from pst_dist.storage.foreign_json import MOST_WHOLE
from pst_dist.training.engines.deepspeed_config import MOST_BUCKET_ELEMENTS
from pst_dist.training.memory.model_size import ModelShape
from pst_dist.training.memory.optimizer_memory import optimizer_bytes

_NF4_BYTES = 0.516
"""Bytes a weight in NF4 with double quantisation: 4.127 bits (Dettmers et al., arXiv 2305.14314, section 3)."""
_PROGRAM_BYTES = {False: 0.45 * 2**30, True: 0.6 * 2**30}
"""Resident memory of a rank before its student is built, without and with DeepSpeed (torch 2.13, transformers 5.24)."""
_GRADIENTS = 1 / 3
"""Share of a layer's tensors whose gradients exist beside them at one moment of the backward pass."""
_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""The most that a chunk of logits takes, on a GPU at least (`kernels.ops.chunk_rows`, which needs torch)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank needs for training."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss_path: float
    buffers: float = 0.0
    """Buckets that collect gradients before they are sent between ranks."""

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer together."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.states + self.buffers + self.activations + self.loss_path


@dataclass(frozen=True)
class HostMemory:
    """Bytes that one rank's process needs in host memory besides what it holds on its device."""

    program: float
    """Libraries and the interpreter."""
    loading: float
    """The most while the weights are read, over the weights that stay."""
    copied: float
    """The copy of weights and moments that a background save writes while training continues."""
    student: float
    """The copy of the weights from which the best student is written, between two steps; on rank zero."""
    offloaded: float
    """Optimizer state and weights that ZeRO keeps in host memory."""

    def on_cpu(self, rank: RankMemory) -> float:
        """The most that a process on CPUs holds: its device is host memory, and some of the parts are never at once."""
        keeping = rank.weights + rank.optimizer + self.student
        return self.program + max(rank.weights + self.loading, self.copied + max(rank.total, keeping))


def rank_memory(
    config: Config,
    shape: ModelShape,
    parameters: int,
    stage: int,
    ranks: int,
    *,
    micro_tokens: int,
    trained: int | None = None,
    longest: int | None = None,
    prompt_share: float = 0.5,
    on_gpu: bool = False,
) -> RankMemory:
    """Memory of one rank at a ZeRO stage (Rajbhandari et al., arXiv 1910.02054, section 3; Adam's K is 12 bytes).

    float32 training needs 4 bytes each for weights and gradients; DeepSpeed's stages 1 to 3 keep a float32 copy of
    their share in addition to Adam's two moments. bf16 at stage 1 and above halves weights and gradients; below it,
    autocast keeps a second copy of the weights from the forward to the backward pass. What DeepSpeed offloads does not
    count on a GPU, but for the weights of a layer. Only `trained` parameters (all by default) have gradients and
    optimizer state. A pass has `micro_tokens` tokens in rows of at most `longest`; an
    encoder reads `prompt_share` of them.
    """
    bf16 = config.train.bf16 is True
    half = bf16 and stage >= 1
    autocast = (bf16 or config.train.fp16) and not half
    trained = parameters if trained is None else trained
    each, p, n = (2.0 if half else 4.0), float(trained), float(ranks)
    frozen = _frozen_bytes(config, shape, parameters - trained, each)
    # The head's gradient in float32, and a chunk of logits in float32 with its gradient; LoRA has none of the head.
    gradient = 0.0 if config.student.lora.rank else 4.0 * shape.vocabulary * shape.hidden_size
    room = (
        max(float(_CHUNK_BYTES["cuda"]), 4.0 * shape.vocabulary * shape.hidden_size) if on_gpu else _CHUNK_BYTES["cpu"]
    )
    chunk = min(room, 4.0 * micro_tokens * shape.vocabulary)
    activations = activation_bytes(config, shape, micro_tokens, longest or micro_tokens, prompt_share)
    copies = 2.0 * parameters if autocast else 0.0
    weights = (each * p + frozen) / (n if stage == 3 else 1)
    optimizer = optimizer_bytes(config, shape, trained) if stage == 0 else 12.0 * p / n
    kept = _in_host_memory(config.train.deepspeed, stage) if on_gpu else set()
    return RankMemory(
        weights=weights / max(1, shape.layers) if "offload_param" in kept else weights,
        gradients=each * p / (n if stage >= 2 else 1),
        optimizer=0.0 if "offload_optimizer" in kept else optimizer,
        activations=activations + copies,
        loss_path=gradient + 2 * chunk,
        buffers=each * _bucket_elements(config.train.deepspeed, trained, stage),
    )


def activation_bytes(config: Config, shape: ModelShape, tokens: float, longest: int, prompt_share: float) -> float:
    """Bytes that autograd saves in a forward pass over `tokens` tokens in rows of at most `longest`.

    In an encoder-decoder, `prompt_share` of them are the encoder's.
    """
    bf16 = config.train.bf16 is True or config.train.fp16
    eager = config.student.attn_implementation == "eager"
    read = tokens * prompt_share if shape.encoder_layers else 0.0
    written, rows = tokens - read, max(1.0, tokens / longest)
    lengths = (read / rows, written / rows)
    decoders = shape.layers - shape.encoder_layers
    layer = _layer_bytes(shape, bf16) * written + _attention_bytes(shape, bf16, eager, lengths[1]) * written
    if shape.encoder_layers:
        layer += _cross_bytes(shape, bf16, eager, lengths) * written
        layer += 2 * shape.layer.keys * (2 if bf16 else 4) * read  # the encoder's output as keys and values
    encoder = _layer_bytes(shape, bf16) * read + _attention_bytes(shape, bf16, eager, lengths[0]) * read
    ends = 6 * 4.0 * shape.hidden_size * tokens  # embeddings, the last norm, the hidden state and its gradient
    if config.student.gradient_checkpointing:
        # The input of each layer, and the activations of the one layer being recomputed.
        inputs = 4.0 * shape.hidden_size * (decoders * written + shape.encoder_layers * read)
        return ends + inputs + (1 + _GRADIENTS) * max(layer, encoder)
    return ends + decoders * layer + shape.encoder_layers * encoder + _GRADIENTS * max(layer, encoder)


def _layer_bytes(shape: ModelShape, bf16: bool) -> float:
    """Bytes that a layer saves per token without attention scores.

    In float32 an RMSNorm saves its input, the normalised values and its output, a LayerNorm the first and the last. A
    gated MLP saves gate, activation, up and product; a tanh GELU written out saves five tensors. Under autocast, norms
    stay in float32, and each linear layer keeps its own cast of the input.
    """
    d, one = shape.hidden_size, shape.layer
    f, q, k = one.inner, one.queries, one.keys
    dropped = (2.0 * d + (2.0 * f if one.family == "t5" else 0.0)) * 4 if one.dropout else 0.0
    activation = 4.0 if one.family == "llama" else 7.0 if one.gated else 1.0 + bf16  # a ReLU's output is the next input
    if one.family in ("gpt2", "bert"):
        activation = 5.0 if one.family == "gpt2" else 2.0
        return dropped + (2 * (10.0 * d + activation * f) if bf16 else 4 * (8.0 * d + activation * f))
    if bf16:
        casts = 2.0 * d * (3 + (2 if one.gated else 1))
        return dropped + 16.0 * d + casts + 4.0 * (q + k) + 2 * activation * f
    return dropped + 4 * (6.0 * d + 2.0 * (q + k) + activation * f)


def _attention_bytes(shape: ModelShape, bf16: bool, eager: bool, length: float) -> float:
    """Bytes of scores or masks that a layer saves per token which looks at `length` tokens.

    Fused attention saves only its mask in float32. With dropout PyTorch computes the scores on a CPU, and T5's bias
    keeps them too: then the probabilities are saved, and with dropout its mask and what is left.
    """
    one = shape.layer
    if not (eager or one.dropout or one.family == "t5"):
        return 4.0 * length
    repeated = 2 * (one.queries - one.keys) * (2 if bf16 else 4)
    return (12.0 if one.dropout else 6.0 if bf16 else 4.0) * one.heads * length + repeated


def _cross_bytes(shape: ModelShape, bf16: bool, eager: bool, lengths: tuple[float, float]) -> float:
    """Bytes that cross attention saves per token of the decoder."""
    d, q, item = shape.hidden_size, shape.layer.queries, 2 if bf16 else 4
    norm = 10.0 * d if bf16 else 12.0 * d
    return norm + 2.0 * q * item + _attention_bytes(shape, bf16, eager, lengths[0])


def host_memory(
    config: Config, shape: ModelShape, parameters: int, trained: int, stage: int | None, ranks: int
) -> HostMemory:
    """Host memory of rank zero, which holds the most. `stage` is None for a single process.

    A GGUF file's tensors are read beside a model with random weights. At stage 3 weights are divided while they are
    read, and the best student is collected through a file.
    """
    name = config.student.model_name_or_path or ""
    p, n, divided = float(parameters), float(ranks), stage == 3
    from_gguf = is_gguf(name) or name == "smollm2"
    loading = 4.0 * p if from_gguf else 0.0
    if divided:
        loading = 8.0 * p if from_gguf else 4.0 * shape.vocabulary * shape.hidden_size + 4.0 * p / max(1, shape.layers)
    kept = _in_host_memory(config.train.deepspeed, stage)
    offloaded = (12.0 * trained / n if "offload_optimizer" in kept else 0.0) + (
        4.0 * p / n if "offload_param" in kept else 0.0
    )
    copy = (4.0 * trained + optimizer_bytes(config, shape, trained)) / n if config.train.save_in_background else 0.0
    student = 4.0 * trained if not divided else 0.0
    return HostMemory(_PROGRAM_BYTES[stage is not None], loading, copy, student, offloaded)


def _in_host_memory(deepspeed: str | None, stage: int | None) -> set[str]:
    """Which of `offload_optimizer` and `offload_param` a profile or JSON of this stage asks for."""
    zero = zero_section(deepspeed) if deepspeed is not None and zero_stage(deepspeed) == stage else {}
    return {key for key in ("offload_optimizer", "offload_param") if (zero.get(key) or {}).get("device") == "cpu"}


def _frozen_bytes(config: Config, shape: ModelShape, frozen: int, each: float) -> float:
    """Bytes of frozen weights; in 4 bits all but the embeddings, with scales of half a bit a weight or less."""
    lora = config.student.lora
    if frozen and lora.frozen_dtype == "bfloat16":
        each = 2.0
    embeddings = min(frozen, shape.vocabulary * shape.hidden_size) if lora.quantize else frozen
    return each * embeddings + _NF4_BYTES * (frozen - embeddings)


def _bucket_elements(deepspeed: str | None, parameters: int, stage: int) -> float:
    """Elements of DeepSpeed's gradient buckets: two at stages 1 and 2 where communication overlaps, one at stage 3.

    A bucket has as many elements as the student, at most half a billion, unless the JSON sets another size. Without
    ZeRO, gradients are copied into one bucket of that size once per step.
    """
    # The table's other stages assume our own profiles, in which communication overlaps.
    given = zero_section(deepspeed) if zero_stage(deepspeed) == stage else {"overlap_comm": True}
    size = given.get("reduce_bucket_size")
    each = float(size if isinstance(size, int) and 0 < size <= MOST_WHOLE else min(MOST_BUCKET_ELEMENTS, parameters))
    return each * (2 if stage in (1, 2) and given.get("overlap_comm") else 1)
