"""The settings that a training depends on, and which of them may change between two starts.

There are three kinds of setting. Free: it affects output, place or speed, but no weight. Adjustable: training can
resume with the new value if the user allows it. Changing any other setting requires a new training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.keys import flat_keys
from pst_dist.config.schema import Config, LoraConfig
from pst_dist.errors import StaleError
from pst_dist.storage.manifest import digest_of

_FREE = {
    "logging_steps",
    "report_to",
    "metrics_port",
    "sample_answers",
    "num_threads",
    "padding_free",
    "dataloader_num_workers",
    "save_steps",
    "save_total_limit",
    "save_in_background",
    "deepspeed",
    "accept_changes",
    "timeout_seconds",
    "backend",
    "ray",
}
# The settings contain the batch of a step as one number, however it is cut.
_BATCH = {
    "global_batch_size",
    "per_device_train_batch_size",
    "micro_batch_tokens",
    "gradient_accumulation_steps",
}
_CHOOSES = "train.metric_for_best_model"
BASE = "student.base"
"""Digest or commit of the base of a LoRA student, whose checkpoints do not contain its weights."""
_IMPLIED: dict[str, Any] = {
    "student.new_token_init": "mean",
    "layout.system": None,
    "layout.separator": " ",
    "layout.turns": None,
    "train.optim": "adamw",
    "train.fp16": False,
    "train.head_learning_rate": None,
    "train.embedding_learning_rate": None,
    "train.early_stopping_patience": None,
    "train.min_lr_ratio": 0.1,
    "train.decay_ratio": 0.2,
    **{f"student.lora.{key}": value for key, value in LoraConfig().model_dump(mode="json").items()},
    BASE: None,
    "loss.alignment_share": None,
    "loss.head_init": "random",
}
"""Settings that older trainings did not have, with the value that they used. A setting with that value is left out, so
that the digest of an older training does not change."""
_ADJUSTABLE = {
    *(
        "train.learning_rate",
        "train.head_learning_rate",
        "train.embedding_learning_rate",
        "train.weight_decay",
        "train.adam_beta1",
        "train.adam_beta2",
        "train.adam_epsilon",
    ),
    *("train.max_grad_norm", "train.num_train_epochs", "train.max_steps", "train.lr_scheduler_type"),
    *("train.early_stopping_patience", "train.min_lr_ratio", "train.decay_ratio"),
    *("train.warmup_ratio", "train.bf16", "train.fp16", "train.eval_steps", _CHOOSES),
    *("train.skip_bad_steps", "train.max_rollbacks", "train.spike_factor", "train.spike_window"),
    *("loss.answer_weight", "loss.rationale_weight", "loss.alignment_weight", "loss.alpha", "loss.temperature"),
    "loss.alignment_share",
}


def choosing_metric(config: Config) -> str:
    """The field of `ValidationScore` that chooses the best student.

    A student that thinks first answers after the rationale that it writes itself, so the likelihood of the answer after
    the teacher's says little of it: `answer_nll` is then that of rationale and answer together.
    """
    metric = config.train.metric_for_best_model
    thinks = any(asked.thinks_first for asked in ARMS[config.arm].asked)
    return "written_nll" if metric == "answer_nll" and thinks else metric


def chosen_alike(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two trainings choose by the same metric, so that values of one can be compared with the other's."""
    return saved.get(_CHOOSES) == wanted.get(_CHOOSES)


def training_settings(
    config: Config, shards_digest: str, embeddings_digest: str | None, batch: int, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that shapes the weights: dotted key -> value; `batch` is the samples of one optimizer step.

    `base` identifies the weights that the student starts from (`base_of`); a LoRA student's settings name them. The
    config must be settled (`training.begun`). Settings with the value that older trainings used are left out.
    """
    settings = flat_keys(config.model_dump(mode="json", include={"arm", "task", "seed", "layout", "student", "loss"}))
    train = config.train.model_dump(mode="json")
    settings |= {f"train.{key}": value for key, value in train.items() if key not in _FREE | _BATCH}
    settings[_CHOOSES] = choosing_metric(config)
    if config.student.lora.rank:
        settings[BASE] = (base or {}).get("sha256") or (base or {}).get("revision")
    settings = {key: value for key, value in settings.items() if key not in _IMPLIED or value != _IMPLIED[key]}
    return settings | {"batch": batch, "shards": shards_digest, "embeddings": embeddings_digest}


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest of all settings: equal ones resume one another."""
    return digest_of(dict(settings))


def check_changes(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, accept: bool) -> list[str]:
    """The settings that differ, as `key old -> new`; empty when none does.

    Raises StaleError, naming them, when one makes another training, or when `accept` is false.
    """
    saved, wanted, changed = _compared(saved, wanted)
    fixed = [key for key in changed if key not in _ADJUSTABLE]
    if fixed:
        raise StaleError(
            f"trained with {_values(fixed, saved)}, this run has {_values(fixed, wanted)}",
            "choose another output_dir, or run again with --rebuild to train anew",
        )
    if changed and not accept:
        raise StaleError(
            f"trained with {_values(changed, saved)}, this run has {_values(changed, wanted)}",
            "restore it, or resume with the new value: train.accept_changes=true",
        )
    return [f"{key} {_short(saved.get(key))} -> {_short(wanted.get(key))}" for key in changed]


def differing(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, str]:
    """The settings that differ, as `key=value, …`: those saved, and those wanted; both empty when none does."""
    saved, wanted, changed = _compared(saved, wanted)
    return _values(changed, saved), _values(changed, wanted)


def _compared(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Both with the settings that they leave out, and the keys that differ."""
    one, two = {**_IMPLIED, **saved}, {**_IMPLIED, **wanted}
    return one, two, [key for key in sorted({**one, **two}) if one.get(key) != two.get(key)]


def _values(keys: list[str], settings: Mapping[str, Any]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(f"{key}={_short(settings.get(key))}" for key in keys[:3]) + more


def _short(value: Any) -> str:
    """A value on one line; digests are shortened to their beginning."""
    text = "null" if value is None else str(value)
    return text[:12] if len(text) == 64 else text[:60]
