"""The state of an engine as fragments of named parameters, which any engine on any number of ranks can load.

Each rank writes the float32 weights and AdamW moments it holds, wherever ZeRO put them, as one-dimensional fragments of
each parameter's flat form. A reader assembles the fragments it needs from whichever files contain them. So a checkpoint
is independent of world size and ZeRO stage, saving needs no communication, and nothing is unpickled.
`training.checkpoints.checkpoint` turns a set of such files into a checkpoint.

DeepSpeed's own files are tied to stage and world size; its universal format needs a conversion first and cannot go from
stage 2 to 3. We read and write ZeRO's partitions in the same tensors that DeepSpeed's loader of universal checkpoints
writes to (`load_hp_checkpoint_state…` in runtime/zero, deepspeed 0.19).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.distributed.progress import alive
from pst_dist.errors import IntegrityError
from pst_dist.storage.manifest import HashedFile
from pst_dist.training.engines.optimizer import TwoOptimizers

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
_OTHERS = ("momentum_buffer", "absmax1", "absmax2", "state1", "state2")
"""State of Muon, and of bitsandbytes' AdamW: two moments of one byte each, and the scales of their blocks."""
_SLOTS = (WEIGHT, *MOMENTS, *_OTHERS)
_DTYPES = {torch.uint8: ("U8", 1), torch.float32: ("F32", 4)}
_META = "pst"


@dataclass(frozen=True)
class Fragment:
    """Elements `start` … of one parameter's flat form, with the tensors that hold them on this rank."""

    name: str
    start: int
    slots: Mapping[str, Tensor]
    """`weight` and the optimizer's state -> a view [n], to read from or to write into; float32, but for 8-bit state."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.slots[WEIGHT].numel()


def named_tensors(fragments: Iterable[Fragment]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some fragments, with a readable name."""
    return ((f"{slot} {fragment.name}", values) for fragment in fragments for slot, values in fragment.slots.items())


def copied(fragments: Iterable[Fragment]) -> list[Fragment]:
    """A copy of the fragments in host memory."""
    return [
        Fragment(
            fragment.name,
            fragment.start,
            # `.cpu()` copies from a device; on the CPU it returns the tensor itself.
            {slot: v.detach().clone() if v.device.type == "cpu" else v.detach().cpu() for slot, v in slots.items()},
        )
        for fragment in fragments
        for slots in (fragment.slots,)
    ]


def write_fragments(stream: HashedFile, fragments: Iterable[Fragment], *, adam_step: int) -> None:
    """Write one rank's fragments in the safetensors format, one tensor at a time, without a copy of them all.

    The format is eight bytes with the length of the header, the header as JSON, then the tensors' bytes in the order of
    the header's offsets (https://github.com/huggingface/safetensors, "Format").
    """
    ordered = sorted(fragments, key=lambda fragment: fragment.name)
    starts = {fragment.name: fragment.start for fragment in ordered}
    meta = json.dumps({"adam_step": adam_step, "starts": starts}, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {_META: meta}}
    offset = 0
    # Bytes after all float32 values, which then stay aligned.
    parts = [(slot, fragment) for fragment in ordered for slot in _SLOTS if slot in fragment.slots]
    parts.sort(key=lambda part: part[1].slots[part[0]].dtype == torch.uint8)
    for slot, fragment in parts:
        kind, size = _DTYPES.get(fragment.slots[slot].dtype, _DTYPES[torch.float32])
        count = fragment.slots[slot].numel()
        place = [offset, offset + size * count]
        header[f"{slot}/{fragment.name}"] = {"dtype": kind, "shape": [count], "data_offsets": place}
        offset = place[1]
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for slot, fragment in parts:
        values = fragment.slots[slot].detach()
        values = (values if values.dtype == torch.uint8 else values.float()).cpu().contiguous()
        alive()
        if values.numel():  # an empty view cannot be cast; byte order is little-endian wherever torch runs
            stream.write(values.numpy().data.cast("B"))


class FragmentFiles:
    """The combined contents of a checkpoint's fragment files; only headers are read until `fill`."""

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
            raise IntegrityError("not a fragment file of a checkpoint", path=path) from error

    def fill(self, fragment: Fragment) -> None:
        """Copy the stored values into a fragment's tensors; raises IntegrityError when the files lack some of them."""
        alive()
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
                    "it belongs to another student or to an older version of this program",
                )


def trainable(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Named parameters that the optimizer moves; the others keep their initial values."""
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
        if mapping is None:  # entirely on other ranks
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
    """The same `count` elements of the weights and of each moment, as views of their flat form.

    The scales of 8-bit blocks are fewer than the weights; only whole parameters have them.
    """
    kept = {slot: state[slot] for slot in _SLOTS[1:] if slot in state}
    return {
        slot: values.data.view(-1).narrow(0, start, count if values.numel() >= count else values.numel())
        for slot, values in {WEIGHT: weights, **kept}.items()
    }


def start_moments(optimizer: torch.optim.Optimizer, places: Iterable[Tensor], adam_step: int) -> None:
    """Create the state that the first step would create where missing, and set its count of steps to `adam_step`."""
    for place in places:
        if isinstance(optimizer, TwoOptimizers) and optimizer.start(place, adam_step):
            continue
        state = optimizer.state[place]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(place, memory_format=torch.preserve_format, requires_grad=False)
        # torch keeps the count as a float32 tensor on the CPU, one for each tensor.
        state["step"] = torch.tensor(float(adam_step), dtype=torch.float32)


def adam_steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps the optimizer has taken; 0 before the first."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
