"""The PST loss path: cross-entropy on supervised rows only, pooled spans, and distances to the teacher.

`reference` defines in plain PyTorch what each kernel computes, `triton_backend` computes the same on CUDA, and
`dispatch` chooses between them. `ops`, `contrastive` and `head` connect them to autograd and `torch.compile`. The
kernels take activations, never parameters by name, so ZeRO-3, LoRA and autocast work as usual.
"""
