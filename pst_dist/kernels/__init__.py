"""The PST loss path: cross-entropy on supervised rows only, pooled spans, and distances to the teacher.

`reference` says in plain PyTorch what each kernel computes, `triton_backend` computes the same on CUDA, `dispatch`
chooses; `ops`, `contrastive` and `head` wire them into autograd and `torch.compile`. They take activations, never
parameters by name, so ZeRO-3, LoRA and autocast work as they do without them.
"""
