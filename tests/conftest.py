"""Every test runs offline, on one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():  # Triton's own functions too ask for it when they are imported
    os.environ["TRITON_INTERPRET"] = "1"
