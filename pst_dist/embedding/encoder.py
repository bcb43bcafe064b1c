"""The frozen encoder: turns rationales into unit vectors, and records every setting that affects their bits.

Each distinct text is encoded once, in batches that are sorted by length and limited by a number of tokens.
`embedding.encoder_model` loads the model, `embedding.openvino_engine` can compute instead of torch, and
`embedding.embed` decides what is encoded and where the vectors are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pst_dist.config.schema import EmbedConfig
from pst_dist.distributed.device_memory import in_halves
from pst_dist.embedding.causal import reads_causal
from pst_dist.embedding.encoder_model import check_device, load_encoder_model, pooling_of
from pst_dist.embedding.known_encoder import digests_of, encoder_folder
from pst_dist.embedding.openvino_engine import PROBES, OpenVinoEngine, check_conversion, check_engine
from pst_dist.errors import EnvironmentFault, InputError, IntegrityError
from pst_dist.models.locate import encoder_name, is_hub_id

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_TOKENISE_AT_ONCE = 512
"""Texts of one call of the tokenizer."""


class TextEncoder:
    """A SentenceTransformer or a `CausalReader` that turns texts into unit vectors [n, E] float32."""

    identity: dict[str, Any]
    """Every setting and file that affects the bits of a vector; compared before vectors are used.

    The device is deliberately excluded: vectors from GPU and CPU differ only by rounding.
    """
    dimension: int
    """E."""

    def __init__(self, config: EmbedConfig, device: str | None = None) -> None:
        """Load the model on `device`, else on config.device, else on the best one available.

        Raises EnvironmentFault, InputError or ConfigError when it cannot be loaded or is not an encoder.
        """
        check_device(device or config.device)
        causal = reads_causal(config)
        check_engine(config, causal=causal)
        self._engine: OpenVinoEngine | None = None
        folder = encoder_folder(config)
        self._batch_tokens = config.batch_tokens
        self._model = load_encoder_model(folder, config, device)
        prompts: Mapping[str, str] = getattr(self._model, "prompts", None) or {}
        # Like SentenceTransformer.encode: the model's own default prompt, unless the config sets one.
        default = prompts.get(getattr(self._model, "default_prompt_name", None) or "", "")
        self._prefix: str = config.prefix or default or ""
        self._max_length: int | None = self._model.max_seq_length
        self._prompt_tokens = 0 if causal else self._tokens_left_out()
        self._width: int | None = config.truncate_dim or getattr(self._model, "truncate_dim", None)
        if config.engine == "openvino":
            self._engine = self._converted(config.dtype)
        self.dimension = int(self._encode_rows(self._tokenise(["width"])).shape[1])
        self.identity = {
            "encoder": encoder_name(config.encoder),
            # The hub's cache names a snapshot's folder by its commit.
            "revision": folder.name if is_hub_id(config.encoder) else None,
            **digests_of(config, folder),
            **(self._model.identity if causal else {"pooling": pooling_of(self._model)}),
            "normalise": True,
            "max_seq_length": self._max_length,
            "prefix": self._prefix,
            "dtype": config.dtype,
            "batch_tokens": config.batch_tokens,
            "dimension": self.dimension,
        }
        if config.truncate_dim is not None and self.dimension < config.truncate_dim:
            raise InputError(
                f"embed.truncate_dim is {config.truncate_dim}, but the encoder's vectors have {self.dimension} numbers",
                "choose a smaller one",
                path=folder,
            )
        # These keys exist only where they are set, so embeddings from before these settings existed stay valid.
        if self._width is not None:
            self.identity["truncate_dim"] = self._width
        if self._prompt_tokens:
            self.identity["prompt_tokens_left_out"] = self._prompt_tokens
        if config.engine != "torch":
            self.identity["engine"] = config.engine

    def _converted(self, dtype: str) -> OpenVinoEngine:
        """The loaded model converted for OpenVINO; raises InputError when its vectors differ from torch's."""
        rows = self._tokenise(PROBES)
        constants = {name: value for name, value in self._features(rows).items() if isinstance(value, str | int)}
        example = {name: value for name, value in self._features(rows).items() if name not in constants}
        engine = OpenVinoEngine(self._model, example, constants, dtype)
        # Each text alone, without padding, and then all together.
        batches = [[row] for row in rows] + [rows]
        ours, plain = (
            np.concatenate([self._run(batch, with_engine) for batch in batches]) for with_engine in (engine, None)
        )
        check_conversion(_unit_rows(ours, PROBES * 2), _unit_rows(plain, PROBES * 2), dtype)
        return engine

    def cosines_to_torch(self, texts: Sequence[str]) -> np.ndarray:
        """[n] cosine of each text's vector to the one that torch computes in float32; all 1 where torch computes."""
        rows = self._tokenise(texts)
        batches = list(plan_batches([len(row["input_ids"]) for row in rows], self._batch_tokens))
        cosines = np.ones(len(texts))
        for batch in batches if self._engine is not None else ():
            found, wanted = (
                _unit_rows(self._run([rows[i] for i in batch], engine), [texts[i] for i in batch])
                for engine in (self._engine, None)
            )
            cosines[batch] = (found.astype(np.float64) * wanted).sum(1)
        return cosines

    def _tokens_left_out(self) -> int:
        """Number of the prefix's tokens that pooling leaves out, as some encoders with instructions require."""
        modules: list[Any] = list(self._model)
        if not self._prefix or all(getattr(module, "include_prompt", True) for module in modules):
            return 0
        ids = self._tokenise_whole([self._prefix])[0]["input_ids"].tolist()
        # The last token may be the one that ends a text, which does not belong to the prefix.
        return len(ids) - (ids[-1] in self._tokenizer.all_special_ids)

    def encode(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> np.ndarray:
        """Unit vectors [n, E] float32 in the order of `texts`; equal texts are encoded once.

        Batches depend only on the set of texts, so the same texts give the same bits, unless a batch does not fit in
        memory and is computed in halves. `advance` receives the number of texts finished by each batch. Raises
        IntegrityError when the encoder returns a vector that is zero or not finite.
        """
        unique = sorted(set(texts))
        rows_of: dict[str, list[int]] = {text: [] for text in unique}
        for row, text in enumerate(texts):
            rows_of[text].append(row)
        tokenised = self._tokenise(unique)
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for batch in plan_batches([len(row["input_ids"]) for row in tokenised], self._batch_tokens):
            block = _unit_rows(self._encode_rows([tokenised[i] for i in batch]), [unique[i] for i in batch])
            finished = 0
            for vector, i in zip(block, batch, strict=True):
                vectors[rows_of[unique[i]]] = vector
                finished += len(rows_of[unique[i]])
            if advance is not None:
                advance(finished)
        return vectors

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Number of texts that exceed the encoder's limit and are truncated."""
        if self._max_length is None or not texts:
            return 0
        prefixed = [self._prefix + text for text in texts]
        token_ids = self._tokenizer(prefixed, truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > self._max_length for ids in token_ids)

    @property
    def model(self) -> Any:
        """The SentenceTransformer, or the `CausalReader`; training changes it in place."""
        return self._model

    @property
    def _tokenizer(self) -> Any:
        return self._model.tokenizer

    def _tokenise(self, texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """One dict of [T] tensors per text, with the prefix and without padding."""
        return self._tokenise_whole([self._prefix + text for text in texts])

    def _tokenise_whole(self, texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        prepare = getattr(self._model, "preprocess", None) or self._model.tokenize  # 5.x and before
        rows: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(texts), _TOKENISE_AT_ONCE):
            features = prepare(list(texts[start : start + _TOKENISE_AT_ONCE]))
            mask_BT = features["attention_mask"].bool()
            tensors = {
                name: value for name, value in features.items() if getattr(value, "shape", None) == mask_BT.shape
            }
            rows.extend({name: value[i][mask_BT[i]] for name, value in tensors.items()} for i in range(len(mask_BT)))
        return rows

    def _encode_rows(self, rows: Sequence[dict[str, torch.Tensor]]) -> np.ndarray:
        """Vectors [B, E] float32 of a batch, not normalised, in one forward pass or in halves that fit in memory.

        Raises EnvironmentFault for a text that does not fit by itself.
        """
        parts = in_halves(rows, lambda part: self._run(part, self._engine), _too_long, on_halving=_warn_of_halving)
        return np.concatenate([vectors for _, vectors in parts])

    def _run(self, rows: Sequence[dict[str, torch.Tensor]], engine: OpenVinoEngine | None) -> np.ndarray:
        """Vectors [B, E] float32 of one forward pass by this engine, or by torch for None."""
        features = self._features(rows)
        if engine is not None:
            return engine(features)[:, : self._width]
        import torch

        with torch.inference_mode():
            vectors: torch.Tensor = self._model(features)["sentence_embedding"]
            return vectors[:, : self._width].float().cpu().numpy()

    def _features(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """The model's input: the rows padded to [B, T], and the settings that it reads with them."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        left = getattr(self._tokenizer, "padding_side", "right") == "left"
        fill = {"input_ids": getattr(self._tokenizer, "pad_token_id", None) or 0}
        features: dict[str, Any] = {}
        for name in rows[0]:
            block = torch.full((len(rows), longest), fill.get(name, 0), dtype=rows[0][name].dtype)
            for i, row in enumerate(rows):
                length = len(row[name])
                block[i, longest - length if left else 0 : longest if left else length] = row[name]
            features[name] = block.to(self._model.device)
        features["modality"] = "text"
        if self._prompt_tokens:
            features["prompt_length"] = self._prompt_tokens
        return features


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Split rows into batches with rows x longest <= batch_tokens, longest first; a row over the budget gets its own.

    Rows of equal length keep their order, so the plan depends only on the lengths.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def _warn_of_halving(rows: Sequence[dict[str, torch.Tensor]]) -> None:
    log.warning(
        "a batch of %d texts, of up to %d tokens, does not fit in memory: continuing in halves (embed.batch_tokens)",
        *(len(rows), max(len(row["input_ids"]) for row in rows)),
    )


def _too_long(row: dict[str, torch.Tensor]) -> EnvironmentFault:
    return EnvironmentFault(
        f"a text of {len(row['input_ids'])} tokens does not fit in the memory of the encoder's device",
        "lower embed.max_seq_length, or set embed.dtype=bfloat16 or embed.device=cpu",
    )


def _unit_rows(vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Rows divided by their length, in float64 and back to float32; raises IntegrityError for a bad one."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)
    if bad.any():
        text = texts[int(np.argmax(bad))]
        raise IntegrityError(
            f"the encoder returns a vector that is zero or not finite for {text[:60]!r}",
            "try embed.dtype=float32 or another embed.encoder",
        )
    return (vectors / norms).astype(np.float32)
