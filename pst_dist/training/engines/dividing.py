"""Builds a student for ZeRO-3 with every weight split over the ranks from the start.

deepspeed.zero.Init divides a module's weights when the module has been created, so the most that a rank holds is its
share and one layer. Weights of a folder or hub id are read by transformers' own ZeRO-3 path: rank zero maps the files
into memory and the others receive one layer at a time. Random weights are drawn in the order of a whole model, so a
student starts with the same values at every stage. Students that can only be built whole (from a GGUF file, a
merged adapter or a warm start) are built in rank zero's host memory and split from there.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.progress import alive, working
from pst_dist.distributed.ranks import Ranks, from_main, main_first_errors
from pst_dist.student.holding import WHOLE, Holding
from pst_dist.training.engines.deepspeed_config import deepspeed_settings, import_deepspeed

log = logging.getLogger(__name__)


def holding_of(train: TrainConfig, ranks: Ranks) -> Holding:
    """How the ranks hold the student that an engine is going to train: divided at stage 3, whole otherwise."""
    if train.deepspeed is None:
        return WHOLE
    settings = deepspeed_settings(train, ranks.world_size)
    zero = settings["zero_optimization"]
    if zero["stage"] != 3:
        return WHOLE
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        # Shares on a disk are written in the dtype of the training at once, and ours are float32 until the end.
        log.warning("weights offloaded to nvme: every rank first builds the whole student in host memory")
        return WHOLE
    return DividedHolding(settings, ranks)


class DividedHolding(Holding):
    """Every weight is divided when it is created; a process group must exist."""

    divides = True

    def __init__(self, settings: dict[str, Any], ranks: Ranks) -> None:
        self._half = bool(settings.get("bf16", {}).get("enabled"))
        # Built in float32 and cast at the end: random numbers and means in bfloat16 would be others.
        self._settings = {key: value for key, value in settings.items() if key != "bf16"}
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
        )
        self._ranks, self._zero = ranks, deepspeed.zero

    def fresh(self, make: Callable[[], Any]) -> Any:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            make()  # imports what it needs: modules imported within zero.Init would see a changed torch
        with self._zero.Init(config_dict_or_path=self._settings), _initialising(self):
            return make()

    def read(self, load: Callable[[], Any]) -> Any:
        with _told_transformers(self._settings):
            return load()

    def resize(self, model: Any, rows: int, multiple: int) -> None:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        resized_head = model._get_resized_lm_head

        def without_draws(*arguments: Any, **keywords: Any) -> Any:
            with torch.random.fork_rng(devices=[]):
                return resized_head(*arguments, **keywords)

        # Of a whole model, a tied head has grown with the embeddings and draws nothing.
        model._get_resized_lm_head = without_draws if tied else resized_head
        try:
            with _told_transformers(self._settings):
                super().resize(model, rows, multiple)
        finally:
            del model._get_resized_lm_head

    def whole(self, make: Callable[[], Any]) -> Any:
        model: Any = None
        with main_first_errors(self._ranks), working():
            model = make() if self._ranks.is_main else None
        told = (type(model), model.config, dict(model.named_buffers()), torch.get_rng_state()) if model else None
        kind, config, buffers, generator = from_main(told)
        if model is None:
            with torch.device("meta"):
                model = kind(copy.deepcopy(config))
            for name, value in buffers.items():
                path, _, last = name.rpartition(".")
                model.get_submodule(path)._buffers[last] = value
            torch.set_rng_state(generator)
        for weight in list(model.parameters()):
            alive()
            self._divide(_materialised(model, weight) if weight.is_meta else weight)
        return model

    def gathered(self, weights: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
        return self._zero.GatheredParameters([weight for weight in weights if weight is not None], modifier_rank=0)

    def cast(self, weight: Any, dtype: Any) -> None:
        super().cast(weight, dtype)
        if hasattr(weight, "ds_tensor"):
            weight.ds_tensor.data = weight.ds_tensor.data.to(dtype)

    def finish(self, student: Any) -> None:
        self._zero.Init(module=student, config_dict_or_path=self._settings)
        if self._half:
            for weight in student.parameters():
                if weight.is_floating_point():
                    self.cast(weight, torch.bfloat16)
        gc.collect()

    def _divide(self, weight: nn.Parameter) -> None:
        holder = nn.Module()
        holder.register_parameter("weight", weight)
        self._zero.Init(module=holder, config_dict_or_path=self._settings)


class _TellsTransformers:
    """The part of transformers' HfDeepSpeedConfig that loading and resizing ask; the original needs accelerate."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        """Whether weights are divided."""
        return True


@contextlib.contextmanager
def _told_transformers(settings: dict[str, Any]) -> Iterator[None]:
    """Let transformers know that weights are divided (`is_deepspeed_zero3_enabled`)."""
    from transformers.integrations import deepspeed as integration

    told = _TellsTransformers(settings)  # transformers keeps a weak reference
    integration.set_hf_deepspeed_config(told)
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()


def _materialised(model: nn.Module, weight: nn.Parameter) -> nn.Parameter:
    """An uninitialised weight in host memory in place of one on the meta device, wherever the model has it."""
    made = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is weight:
                module._parameters[name] = made
    return made


@contextlib.contextmanager
def _initialising(holding: DividedHolding) -> Iterator[None]:
    """Let transformers' initialisation see whole weights, in the order in which a whole model draws them.

    Models initialise their modules one by one, some also weights of modules below; all use the functions of
    `transformers.initialization`. transformers' own way (`initialize_weights_zero3`) initialises a finished model on
    rank zero, in another order and without the weights further below, so the values would be others.
    """
    from transformers import PreTrainedModel, initialization

    one_module = PreTrainedModel._initialize_weights

    def initialise(self: Any, module: nn.Module, *arguments: Any, **keywords: Any) -> None:
        alive()
        with holding.gathered(filter(_is_away, module.parameters(recurse=False))):
            one_module(self, module, *arguments, **keywords)

    def gathering(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
            with holding.gathered([tensor]) if _is_away(tensor) else contextlib.nullcontext():
                return function(tensor, *arguments, **keywords)

        return inner

    names = [*initialization.TORCH_INIT_FUNCTIONS, "copy_"]
    before = {name: getattr(initialization, name) for name in names}
    PreTrainedModel._initialize_weights = initialise  # type: ignore[method-assign]
    for name in names:
        setattr(initialization, name, gathering(before[name]))
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = one_module  # type: ignore[method-assign]
        for name in names:
            setattr(initialization, name, before[name])


def _is_away(tensor: Any) -> bool:
    """Whether a weight is divided and not gathered at the moment."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"
