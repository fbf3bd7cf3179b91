"""Writes the checkpoints and config files of this folder; run once, with release 0.1.0 installed.

``python write_release_0_1.py FOLDER``. Each ``NAME.pt.gz`` holds the state of an optimizer after
``BEFORE`` steps on :func:`model`, the weights then (``weights``), and the weights after ``AFTER``
more steps (``expected``), both as one vector. Each ``NAME.json`` is the config as
``save_pretrained`` wrote it.
"""

import contextlib
import copy
import gzip
import sys
from pathlib import Path

import torch
from torch.nn.utils import parameters_to_vector
from transformers import BertConfig, BertForSequenceClassification

import hf_precond

BEFORE, AFTER = 7, 10
FIELDS = {
    "adamr": {"lr": 0.01, "basis_interval": 3, "weight_decay": 0.1},
    "afopt": {"lr": 0.01, "stat_interval": 2, "inverse_interval": 4, "weight_decay": 0.1},
    "nkfac": {"lr": 0.01, "stat_interval": 2, "inverse_interval": 3, "exact_interval": 2,
              "solver": "newton"},
    "sgdph": {"lr": 0.01, "probe_interval": 3, "weight_decay": 0.1},
}  # fmt: skip


def model():
    """A float64 BERT of about 1,500 parameters."""
    sizes = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 12, "max_position_embeddings": 6, "num_labels": 3,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**sizes)).double().train()


def batch(step):
    """A mini-batch that depends on no random generator; two of its rows are padded."""
    places = torch.arange(4 * 5).view(4, 5)
    tokens = (places * 7 + step * 5 + places.square() * step) % 12
    mask = torch.ones_like(tokens)
    mask[::2, 3:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": (tokens[:, 0] + step) % 3}


def train(net, optimizer, start, steps):
    """Take ``steps`` steps, step ``s`` on batch ``s``."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        with getattr(optimizer, "curvature_context", contextlib.nullcontext)():
            loss = net(**batch(step)).loss
            if hasattr(optimizer, "probe"):
                optimizer.probe(loss)
            loss.backward()
        optimizer.step()


def main(folder):
    """Write all files."""
    torch.set_num_threads(1)
    for name, fields in FIELDS.items():
        net = model()
        optimizer = hf_precond.create_optimizer(net, name, **fields)
        train(net, optimizer, 0, BEFORE)
        saved = {"optimizer": copy.deepcopy(optimizer.state_dict())}
        saved["weights"] = parameters_to_vector(net.parameters()).detach().clone()
        train(net, optimizer, BEFORE, AFTER)
        saved["expected"] = parameters_to_vector(net.parameters()).detach().clone()
        with gzip.GzipFile(folder / f"{name}.pt.gz", "wb", mtime=0) as file:
            torch.save(saved, file)
        written = Path(optimizer.config.save_pretrained(folder / name))
        written.rename(folder / f"{name}.json")
        written.parent.rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
