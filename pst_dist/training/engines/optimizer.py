"""The optimizer: AdamW with its parameter groups, the alternatives of `train.optim`, and each step's learning rate.

Muon and 8-bit AdamW update only the hidden matrices. Embeddings, the language-model head, norms, biases and the
alignment head stay with AdamW: Muon is defined for hidden matrices only, and 8-bit moments make embeddings unstable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.config.schema import Config, TrainConfig
from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.student.token_rows import TRAINED_ROWS

RATE_FACTOR = "rate_factor"
"""Key of a parameter group: its learning rate over `train.learning_rate`, at every step of the schedule."""
HEAD = "head."
"""Beginning of the alignment head's parameter names in `Student`."""


def parameter_groups(
    module: nn.Module, weight_decay: float, *, head_factor: float = 1.0, embedding_factor: float = 1.0
) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, biases and norms do not.

    The factors scale the learning rates of the alignment head and of the embeddings. Parameters with equal factors
    share their groups.
    """
    factors = dict.fromkeys((1.0, head_factor, embedding_factor))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {
        (factor, decays): [] for factor in factors for decays in (True, False)
    }
    embeddings = embedding_parameters(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            factor = embedding_factor if parameter in embeddings else 1.0
            groups[head_factor if name.startswith(HEAD) else factor, decays].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, RATE_FACTOR: factor}
        for (factor, decays), parameters in groups.items()
        if parameters
    ]


def adamw(student: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the student's groups, every rate at the peak of its schedule."""
    optimizer = torch.optim.AdamW(_groups(student, train), **_adam_settings(train))
    set_learning_rate(optimizer.param_groups, train.learning_rate)
    return optimizer


def _groups(student: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    rate = train.learning_rate
    return parameter_groups(
        student,
        train.weight_decay,
        head_factor=(train.head_learning_rate or rate) / rate,
        embedding_factor=(train.embedding_learning_rate or rate) / rate,
    )


def embedding_parameters(student: Any) -> set[nn.Parameter]:
    """The matrices of a student's input and output embeddings, and the rows of added tokens that LoRA trains."""
    model: Any = getattr(student, "model", None)
    if not hasattr(model, "get_input_embeddings"):
        return set()
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {module.weight for module in modules if module is not None}
    return found | {parameter for name, parameter in model.named_parameters() if name.endswith(TRAINED_ROWS)}


def _adam_settings(train: TrainConfig) -> dict[str, Any]:
    return {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }


class TwoOptimizers(torch.optim.Optimizer):
    """One optimizer for the hidden matrices and AdamW for the rest, seen as one: they share groups and state."""

    def __init__(self, matrices: torch.optim.Optimizer, rest: torch.optim.Optimizer) -> None:
        super().__init__([*matrices.param_groups, *rest.param_groups], {})
        self.matrices, self.rest = matrices, rest
        matrices.state = rest.state = self.state
        self._places = {
            parameter: (group, which, index)
            for which, group in enumerate(matrices.param_groups)
            for index, parameter in enumerate(group["params"])
        }

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # the trainer passes no closure
        """Move all weights once."""
        self.matrices.step()
        self.rest.step()

    def start(self, parameter: Tensor, step: int) -> bool:
        """Create the state of a hidden matrix as after `step` steps, without its values; False for any other tensor."""
        if parameter not in self._places:
            return False
        state = self.state[parameter]
        if isinstance(self.matrices, torch.optim.Muon):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            return True
        if not state:
            bitsandbytes: Any = self.matrices
            bitsandbytes.init_state(*self._place(parameter))
        state["step"] = step
        return True

    def _place(self, parameter: Tensor) -> tuple[dict[str, Any], Tensor, int, int]:
        """The arguments of bitsandbytes' `init_state`."""
        group, which, index = self._places[parameter]
        return group, parameter, which, index


def build_optimizer(student: Any, train: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """What `train.optim` names, for one process. Raises ConfigError and EnvironmentFault as `check_optimizer`."""
    if train.optim == "adamw":
        return adamw(student, train)
    check_optimizer(train)
    matrices = hidden_matrices(student)
    if not matrices:
        raise ConfigError(f"train.optim={train.optim}: the student has no hidden matrix", "use train.optim=adamw")
    of_matrices: list[dict[str, Any]] = []
    of_rest: list[dict[str, Any]] = []
    for group in _groups(student, train):
        for chosen, is_hidden in ((of_matrices, True), (of_rest, False)):
            parameters = [value for value in group["params"] if (value in matrices) is is_hidden]
            if parameters:
                chosen.append({**group, "params": parameters})
    first: torch.optim.Optimizer
    if train.optim == "muon":
        # With this factor the update is as large as AdamW's, so learning rate and weight decay mean the same
        # (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2).
        first = torch.optim.Muon(of_matrices, lr=train.learning_rate, adjust_lr_fn="match_rms_adamw")
    else:
        from bitsandbytes.optim.adamw import AdamW8bit

        first = AdamW8bit(of_matrices, **_adam_settings(train))
    rest = torch.optim.AdamW(of_rest, **_adam_settings(train))
    both = TwoOptimizers(first, rest)
    set_learning_rate(both.param_groups, train.learning_rate)
    return both


def hidden_matrices(student: Any) -> set[Tensor]:
    """The trained weights of a student's linear layers, without its language-model head and its alignment head."""
    from transformers.pytorch_utils import Conv1D

    head = student.model.get_output_embeddings()
    embeddings = {module.weight for module in student.model.modules() if isinstance(module, nn.Embedding)}
    layers = (module for module in student.model.modules() if isinstance(module, nn.Linear | Conv1D))
    weights = (layer.weight for layer in layers if layer is not head)
    return {weight for weight in weights if weight.requires_grad and weight.ndim == 2 and weight not in embeddings}


def high_rate(config: Config) -> str | None:
    """A warning about a learning rate four times the default for this kind of pretrained student, or None.

    A rate found for random weights is often more than ten times too high for pretrained ones, which then forget what
    they knew. `demo` has such a rate, for its own student.
    """
    student, rate = config.student, config.train.learning_rate
    if student.model_name_or_path is None or rate <= 4 * student.learning_rate:
        return None
    kind = "LoRA" if student.lora.rank else "a pretrained student"
    return f"train.learning_rate={rate:g} is high for {kind}: the default would be {student.learning_rate:g}"


def check_optimizer(train: TrainConfig) -> None:
    """Raise EnvironmentFault when this machine's packages lack what `train.optim` names; imports no model."""
    if train.optim == "muon" and not hasattr(torch.optim, "Muon"):
        raise EnvironmentFault(
            f"train.optim=muon needs torch 2.9 or newer, found {torch.__version__}", "pip install 'torch>=2.9'"
        )
    if train.optim == "adamw_8bit":
        try:
            import bitsandbytes
            from bitsandbytes.optim.adamw import AdamW8bit  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault(
                "train.optim=adamw_8bit needs the package bitsandbytes", "pip install 'pst-dist[bitsandbytes]'"
            ) from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in getattr(bitsandbytes, "supported_torch_devices", {"cuda"}) or not _has_kernel(device):
            raise EnvironmentFault(
                f"train.optim=adamw_8bit: bitsandbytes {bitsandbytes.__version__} has no 8-bit AdamW for {device}",
                "pip install -U bitsandbytes, or use train.optim=adamw",
            )


def _has_kernel(device: str) -> bool:
    """Whether bitsandbytes registered its blockwise 8-bit update for a kind of device."""
    name = "bitsandbytes::optimizer_update_8bit_blockwise"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Give each group its own rate when the body's is `learning_rate`."""
    for group in groups:
        group["lr"] = learning_rate * group[RATE_FACTOR]


def learning_rate_at(step: int, total: int, train: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up, then the schedule of `train.lr_scheduler_type`.

    After warm-up these are the schedules of `transformers.get_scheduler`; the warm-up itself starts one step earlier,
    because a first step with rate zero teaches nothing.
    """
    warmup = math.ceil(train.warmup_ratio * total)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    return train.learning_rate * _decayed(step, warmup, total, train)


def _decayed(step: int, warmup: int, total: int, train: TrainConfig) -> float:
    """The rate of a step after warm-up, as a share of the peak."""
    kind = train.lr_scheduler_type
    if kind == "constant":
        return 1.0
    if kind == "inverse_sqrt":
        scale = warmup or total  # transformers' default time scale is the length of the warm-up
        return math.sqrt(scale / (step - warmup + scale))
    if kind == "warmup_stable_decay":
        decay = max(1, math.ceil(train.decay_ratio * total))
        progress = max(0.0, (step - (total - decay)) / decay)
        return train.min_lr_ratio + (1 - train.min_lr_ratio) * _half_cosine(progress)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return 1 - progress
    lowest = train.min_lr_ratio if kind == "cosine_with_min_lr" else 0.0
    return lowest + (1 - lowest) * _half_cosine(progress)


def _half_cosine(progress: float) -> float:
    """From 1 at `progress` 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
