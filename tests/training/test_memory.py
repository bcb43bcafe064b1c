"""The memory of the plan against what autograd really saves, and against the peak of real trainings."""

import json
import os
import subprocess
import sys

import pytest
import torch
from small_run import small_config

from pst_dist.config.schema import Config, FreshConfig
from pst_dist.diagnostics.cost import Machines, make_plan
from pst_dist.training.memory.model_size import shape_of_config
from pst_dist.training.memory.training_memory import HostMemory, RankMemory, activation_bytes

ROWS, LENGTH = 4, 48
COMMON = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
MODELS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 256, "n_head": 4, "n_layer": 3, "n_positions": 64},
    "llama": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "t5": {"model_type": "t5", "d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 4},
}
CASES = {
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2-dropout": ("gpt2", {}),
    "llama": ("llama", {}),
    "llama-grouped": ("llama", {"num_key_value_heads": 1, "intermediate_size": 512}),
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}),
    "t5-relu": ("t5", {"dropout_rate": 0.0}),
}


def saved_bytes(settings: dict, attention: str, bf16: bool) -> float:
    """Bytes that a model's forward pass keeps for the backward pass, without weights and their casts."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    shape = AutoConfig.for_model(**settings, **COMMON)
    seq2seq = settings["model_type"] == "t5"
    family = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = family.from_config(shape, attn_implementation=attention).train()
    head, kept, shapes = model.get_output_embeddings(), {}, {tuple(weight.shape) for weight in model.parameters()}
    head.forward = lambda hidden: hidden.sum()[None, None, None].expand(1, 1, 64)  # ours reads supervised rows only
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        is_weight = storage.data_ptr() in own or tuple(tensor.shape) in shapes or tuple(tensor.T.shape) in shapes
        if not (is_weight and tensor.dim() == 2):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    ids = torch.randint(2, 60, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    more = {"decoder_input_ids": ids, "decoder_attention_mask": mask} if seq2seq else {}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(input_ids=ids, attention_mask=mask, use_cache=False, **more)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_activations_are_what_autograd_saves(name, attention, bf16):
    kind, changes = CASES[name]
    settings = MODELS[kind] | changes
    config = Config.model_validate({"student": {"attn_implementation": attention}, "train": {"bf16": bf16}})
    shape = shape_of_config(settings | {"vocab_size": 64}, None, "here")
    tokens = ROWS * LENGTH * (2 if kind == "t5" else 1)
    longest = LENGTH * (2 if kind == "t5" else 1)
    found = activation_bytes(config, shape, tokens, longest, 0.5)
    # The estimate also has the gradients of one layer and of the last hidden state, which exist in the backward pass.
    working = found / (3 * shape.layers + 1) + 6 * 4 * 256 * tokens
    saved = saved_bytes(settings, attention, bf16)
    assert 0.85 * saved < found < 1.15 * saved + working


def test_a_process_on_cpus_needs_its_program_and_the_larger_of_loading_training_and_saving():
    rank = RankMemory(weights=4, gradients=4, optimizer=8, activations=3, loss_path=1)
    assert HostMemory(program=2, loading=1, copied=0, student=4, offloaded=0).on_cpu(rank) == 2 + 20
    assert HostMemory(program=2, loading=1, copied=12, student=4, offloaded=0).on_cpu(rank) == 2 + 12 + 20
    assert HostMemory(program=2, loading=40, copied=0, student=4, offloaded=0).on_cpu(rank) == 2 + 44


PEAK = """
import json, sys
from pst_dist.config.schema import Config
from pst_dist.training.trainer import train
train(Config.model_validate(json.loads(open(sys.argv[1]).read())))
# Not ru_maxrss, which begins with the size of the process that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_the_plan_says_what_a_real_training_takes_at_its_peak(architecture, small_data, tmp_path):
    """Two steps of a student of about 15 million weights, 24 rows in one pass."""
    config = small_config(
        small_data,
        tmp_path / "run",
        arm="post_thinking",
        student__fresh__architecture=architecture,
        student__fresh__hidden_size=512,
        student__fresh__num_layers=4 if architecture != "t5" else 2,
        student__fresh__num_heads=8,
        train__bf16=False,
        train__max_steps=2,
        train__global_batch_size=24,
        train__per_device_train_batch_size=24,
        train__micro_batch_tokens="null",
    )
    assert isinstance(config.student.fresh, FreshConfig)
    plan = make_plan(config, Machines())
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "config.json")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.splitlines()[-1])
    print(f"{architecture}: planned {plan.host.on_cpu(plan.memory) / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB")
    # Not all that is counted exists at one moment: measured 1.13 (gpt2), 1.17 (llama) and 1.21 (t5).
    assert 0.95 * peak < plan.host.on_cpu(plan.memory) < 1.25 * peak
