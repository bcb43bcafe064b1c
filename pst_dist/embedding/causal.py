"""A causal language model as the encoder of rationales: the hidden state of one layer, at the last token or averaged.

A language model's middle layers know where a reasoning ends; sentence encoders mostly know its topic. `CausalReader`
has the parts of a SentenceTransformer that `embedding.encoder` uses, so batching, shards, Ray and the store are the
same. Layers above the one that is read are not computed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pst_dist.config.schema import EmbedConfig
from pst_dist.errors import ConfigError, InputError
from pst_dist.models.load import load_language_model, load_model_config, load_tokenizer, positions_of
from pst_dist.models.locate import ModelPlace, is_gguf, locate_encoder, locate_model

# Shapes in this file: B texts, T tokens, D model width

log = logging.getLogger(__name__)
_WHAT = "the encoder"
_LONG = 100_000
"""A limit beyond which a length in a config means that none is set."""


class _Read(Exception):
    """Ends a forward pass at the layer that is read."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden


def reads_causal(config: EmbedConfig) -> bool:
    """Whether the encoder is read as a causal language model, rather than by sentence-transformers."""
    return config.layer is not None or config.pooling is not None or is_gguf(config.encoder)


def causal_place(config: EmbedConfig) -> ModelPlace:
    """Where the model is; a hub id is fetched. Raises EnvironmentFault or InputError."""
    if is_gguf(config.encoder):
        return locate_model(config.encoder)
    return ModelPlace(config.encoder, str(locate_encoder(config.encoder, config.revision)), local_only=True)


def check_causal(config: EmbedConfig) -> Any:
    """The model's Hugging Face config; raises what loading it would raise, as far as its config files show."""
    place = causal_place(config)
    if (Path(place.target) / "modules.json").is_file() and place.gguf is None:
        raise ConfigError(
            "is a sentence-transformers model, which has a pooling of its own",
            "remove embed.layer and embed.pooling, or name a causal language model",
            path=config.encoder,
        )
    shape = load_model_config(place, _WHAT)
    names = getattr(shape, "architectures", None) or []
    # A GGUF file names no class. Encoders such as BERT can be loaded as causal models, but were not trained as such.
    is_causal = place.gguf is not None or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if shape.is_encoder_decoder or not is_causal:
        raise ConfigError(
            f"is not a causal language model ({', '.join(names) or shape.model_type})",
            "remove embed.layer and embed.pooling, or name a causal language model",
            path=config.encoder,
        )
    layer_of(config, _layers(shape))
    return shape


def _layers(shape: Any) -> int:
    return int(shape.get_text_config().num_hidden_layers)


def layer_of(config: EmbedConfig, layers: int) -> int:
    """The layer that is read, from 1; raises ConfigError when the model has no such layer."""
    wanted = config.layer if config.layer is not None else max(1, round(layers / 2))
    if wanted == 0 or abs(wanted) > layers:
        raise ConfigError(
            f"embed.layer={wanted}: the encoder has layers 1 to {layers}",
            f"use one of them, or -1 to -{layers} to count from the end",
            path=config.encoder,
        )
    return wanted if wanted > 0 else layers + 1 + wanted


class CausalReader:
    """Tokenises texts, and turns a padded batch of them into vectors, as `TextEncoder` asks a SentenceTransformer to.

    A text that is too long loses its beginning with pooling `last`, whose vector is that of the end, and its end with
    `mean`, as with sentence encoders.
    """

    prompts: dict[str, str] = {}  # noqa: RUF012 (as in SentenceTransformer)
    default_prompt_name = None

    def __init__(self, config: EmbedConfig, device: str | None) -> None:
        """Raises EnvironmentFault, InputError or ConfigError, in one line, for a model that cannot be read so."""
        import torch

        check_causal(config)
        place = causal_place(config)
        self.pooling = config.pooling or "last"
        self.tokenizer = load_tokenizer(place, "the encoder's tokenizer")
        self.tokenizer.padding_side = "right"  # positions then start at 0 in every row, whatever the batch
        self.tokenizer.truncation_side = "left" if self.pooling == "last" else "right"
        model = load_language_model(place, _WHAT).to(getattr(torch, config.dtype))
        # The model without its head over the vocabulary, which would take most of the memory.
        self._model = model.base_model.to(device or config.device or _best_device()).eval()
        self.device = self._model.device
        self.layers = _layers(model.config)
        self.layer = layer_of(config, self.layers)
        self.max_seq_length = self._limit(config, positions_of(model.config.get_text_config()))
        self._block = self._block_of_layer()
        log.info(
            "encoder: %s on %s, %s, layer %d of %d, %s token%s, at most %s tokens",
            place.name,
            self.device,
            config.dtype,
            self.layer,
            self.layers,
            self.pooling,
            "" if self.pooling == "last" else "s",
            self.max_seq_length,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What affects the bits of a vector, besides the files of the model."""
        return {
            "pooling": self.pooling,
            "layer": self.layer,
            "layers": self.layers,
            "truncation": self.tokenizer.truncation_side,
        }

    def _limit(self, config: EmbedConfig, positions: int | None) -> int | None:
        own = getattr(self.tokenizer, "model_max_length", None)
        known = [length for length in (positions, own) if isinstance(length, int) and 0 < length < _LONG]
        limit = min(known, default=None)
        if config.max_seq_length is not None and limit is not None and config.max_seq_length > limit:
            raise InputError(f"embed.max_seq_length is {config.max_seq_length}, but the encoder's own limit is {limit}")
        return config.max_seq_length or limit

    def tokenize(self, texts: Sequence[str]) -> dict[str, Any]:
        """[B, T] int64 ids and mask, truncated and padded. Raises InputError for a text without tokens."""
        import torch

        cut: dict[str, Any] = {"truncation": True, "max_length": self.max_seq_length} if self.max_seq_length else {}
        rows = self.tokenizer(list(texts), verbose=False, **cut)["input_ids"]
        if not all(rows):
            raise InputError("a text has no tokens with this encoder", "remove the empty text, or set embed.prefix")
        # Padded here: many of these tokenizers have no padding token, and what it is does not matter after the text.
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for index, row in enumerate(rows):
            ids_BT[index, : len(row)], mask_BT[index, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids_BT, "attention_mask": mask_BT}

    def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
        """`sentence_embedding` [B, D] in the model's precision, from right-padded ids and mask."""
        import torch

        mask_BT = features["attention_mask"]
        hidden_BTD = self._hidden(features["input_ids"], mask_BT)
        lengths_B = mask_BT.sum(-1)
        if self.pooling == "last":
            rows = torch.arange(len(lengths_B), device=lengths_B.device)
            return {"sentence_embedding": hidden_BTD[rows, lengths_B - 1]}
        weights = mask_BT[..., None].float()
        return {"sentence_embedding": (hidden_BTD.float() * weights).sum(1) / lengths_B[:, None]}

    def _hidden(self, ids_BT: Any, mask_BT: Any) -> Any:
        """[B, T, D] of the layer that is read."""
        given = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
        if self._block is None:
            return self._model(**given, output_hidden_states=True).hidden_states[self.layer]
        with self._reading():
            try:
                self._model(**given)
            except _Read as read:
                return read.hidden
        raise AssertionError("the layer was not run")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        def stop(module: Any, inputs: Any, output: Any) -> None:
            raise _Read(output[0] if isinstance(output, tuple) else output)

        handle = self._block.register_forward_hook(stop)
        try:
            yield
        finally:
            handle.remove()

    def _block_of_layer(self) -> Any:
        """The module whose output is the layer, so that a pass can end there; None where none gives the same values.

        The last layer of most models is followed by a norm, which belongs to it.
        """
        import torch
        from torch import nn

        lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
        for blocks in lists:
            if len(blocks) != self.layers or self.layer == self.layers:
                continue
            ids = torch.tensor([self.tokenizer("two and three")["input_ids"]], device=self.device)
            self._block = None
            with torch.inference_mode():
                wanted = self._hidden(ids, torch.ones_like(ids))
                self._block = blocks[self.layer - 1]
                with contextlib.suppress(AssertionError):
                    found = self._hidden(ids, torch.ones_like(ids))
                    if found.shape == wanted.shape and torch.equal(found, wanted):
                        del blocks[self.layer :]  # never run: a large model then needs less memory
                        return self._block
        return None


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
