"""Libraries that print on their own account are asked to leave the terminal to us."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """No progress bars of transformers (it draws one a file), no notes of DeepSpeed about the accelerator it found.

    Call before sentence_transformers or deepspeed are imported: importing the one may import the other.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("DeepSpeed", "deepspeed", "sentence_transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
