"""The state of an engine as fragments of named parameters, so that any engine on any number of ranks can take it up.

Each rank writes the float32 weights and AdamW moments that lie on it, wherever ZeRO put them, as one-dimensional
fragments of the parameter's flat form; whoever reads puts together the fragments that it needs from whichever files
have them. So a checkpoint knows no world size and no ZeRO stage, saving needs no communication, and nothing is
unpickled. What makes a set of such files a checkpoint is `checkpoint`'s.

DeepSpeed's own files are tied to stage and world size, and its universal form takes a conversion beforehand and cannot
go from stage 2 to 3. The places where ZeRO keeps its partitions are those that DeepSpeed's own loading of universal
checkpoints writes to (`load_hp_checkpoint_state…` in runtime/zero, deepspeed 0.19).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.errors import IntegrityError
from pst_dist.storage.manifest import HashedFile

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
_SLOTS = (WEIGHT, *MOMENTS)
_META = "pst"


@dataclass(frozen=True)
class Fragment:
    """Elements `start` … of one parameter's flat form, with the places where this rank keeps them."""

    name: str
    start: int
    slots: Mapping[str, Tensor]
    """`weight` and the moments -> a float32 view [n], to read from or to write into."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.slots[WEIGHT].numel()


def named_tensors(fragments: Iterable[Fragment]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some fragments, under a name that a person understands."""
    return ((f"{slot} {fragment.name}", values) for fragment in fragments for slot, values in fragment.slots.items())


def copied(fragments: Iterable[Fragment]) -> list[Fragment]:
    """The same fragments in host memory of their own, as they are now."""
    return [
        Fragment(
            fragment.name,
            fragment.start,
            # From a device, `.cpu()` is a copy already; on the CPU it is the tensor itself.
            {slot: v.detach().clone() if v.device.type == "cpu" else v.detach().cpu() for slot, v in slots.items()},
        )
        for fragment in fragments
        for slots in (fragment.slots,)
    ]


def write_fragments(stream: HashedFile, fragments: Iterable[Fragment], *, adam_step: int) -> None:
    """Write one rank's fragments in the form of safetensors, each tensor as it lies in memory, without a copy of all.

    That form is eight bytes with the length of the header, the header as JSON, the tensors' bytes in the order of its
    offsets (https://github.com/huggingface/safetensors, "Format").
    """
    ordered = sorted(fragments, key=lambda fragment: fragment.name)
    starts = {fragment.name: fragment.start for fragment in ordered}
    meta = json.dumps({"adam_step": adam_step, "starts": starts}, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {_META: meta}}
    offset = 0
    for fragment in ordered:
        for slot in _SLOTS:
            count = fragment.slots[slot].numel()
            place = [offset, offset + 4 * count]
            header[f"{slot}/{fragment.name}"] = {"dtype": "F32", "shape": [count], "data_offsets": place}
            offset = place[1]
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for fragment in ordered:
        for slot in _SLOTS:
            values = fragment.slots[slot].detach().float().cpu().contiguous()
            if values.numel():  # an empty view has no bytes to be seen as; little-endian, as all that torch runs on
                stream.write(values.numpy().data.cast("B"))


class FragmentFiles:
    """What the fragment files of one checkpoint hold together; only headers are read until `fill`."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: list[Any] = []
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        self.adam_step = 0
        """Optimizer steps that the moments have seen."""
        for path in sorted(paths):
            self._add(path)

    def _add(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            stream = safe_open(str(path), framework="pt")
            meta = json.loads((stream.metadata() or {})[_META])
            self.adam_step, starts = int(meta["adam_step"]), meta["starts"]
            for key in stream.keys():
                start = int(starts[key.partition("/")[2]])
                (count,) = stream.get_slice(key).get_shape()
                self._pieces.setdefault(key, []).append((start, start + count, stream))
        except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, OSError) as error:
            raise IntegrityError("not a file of a checkpoint's fragments", path=path) from error

    def fill(self, fragment: Fragment) -> None:
        """Copy the stored values into a fragment's places; raises IntegrityError when some are in no file."""
        for slot, target in fragment.slots.items():
            key, filled = f"{slot}/{fragment.name}", 0
            for start, stop, stream in self._pieces.get(key, []):
                low, high = max(start, fragment.start), min(stop, fragment.stop)
                if low >= high:
                    continue
                values = stream.get_slice(key)[low - start : high - start]
                target.data[low - fragment.start : high - fragment.start].copy_(values)
                filled += high - low
            if filled != target.numel():
                raise IntegrityError(
                    f"the checkpoint has {filled} of {target.numel()} values of {slot} {fragment.name}",
                    "it is of another student, or of an older version of this program",
                )


def trainable(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Named parameters that the optimizer moves; the others are what the student was built with."""
    return ((name, value) for name, value in module.named_parameters() if value.requires_grad)


def whole_fragments(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Fragment]:
    """Every parameter whole, for an engine that keeps all of them on each rank."""
    return [
        Fragment(name, 0, _slots(value, optimizer.state[value], 0, value.numel())) for name, value in trainable(module)
    ]


def zero_fragments(module: nn.Module, zero: Any) -> list[Fragment]:
    """This rank's part of each parameter under ZeRO 1 and 2 (`zero` is DeepSpeed's optimizer)."""
    fragments = []
    for name, value in trainable(module):
        mapping = value._hp_mapping
        if mapping is None:  # lies wholly on other ranks
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        place = mapping.get_hp_fragment_address()
        slots = _slots(flat, zero.optimizer.state[flat], place.start, place.numel)
        fragments.append(Fragment(name, mapping.lp_fragment_address.start, slots))
    return fragments


def zero3_fragments(module: nn.Module, zero: Any, rank: int) -> list[Fragment]:
    """This rank's part of each parameter under ZeRO 3, without the padding that ends the last rank's part."""
    fragments = []
    for name, value in trainable(module):
        group, offset, padded = zero.grad_position[zero.get_param_id(value)]
        start = padded * rank
        count = min(padded, value.ds_numel - start)
        if count <= 0:
            continue
        flat = zero.fp32_partitioned_groups_flat[group]
        fragments.append(Fragment(name, start, _slots(flat, zero.optimizer.state[flat], offset, count)))
    return fragments


def _slots(weights: Tensor, state: Mapping[str, Any], start: int, count: int) -> dict[str, Tensor]:
    """The same `count` elements of the weights and of each moment, as views of their flat form."""
    whole = {WEIGHT: weights, **{moment: state[moment] for moment in MOMENTS}}
    return {slot: values.data.view(-1).narrow(0, start, count) for slot, values in whole.items()}


def start_moments(optimizer: torch.optim.Optimizer, places: Iterable[Tensor], adam_step: int) -> None:
    """Give AdamW the moments it would make at its first step, or keep those that are there, at step `adam_step`."""
    for place in places:
        state = optimizer.state[place]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(place, memory_format=torch.preserve_format, requires_grad=False)
        # torch keeps the count as a float32 tensor on the CPU, one for each tensor.
        state["step"] = torch.tensor(float(adam_step), dtype=torch.float32)


def adam_steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps that the optimizer has made; 0 before the first."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
