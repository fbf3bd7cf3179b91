"""Run an example as a user does: a process of its own, offline, all files under one folder."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run_example(script: str, *arguments: str, folder: Path) -> str:
    """What the script printed; fails with its errors when it ends with another code than 0."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in evaluation mode" not in done.stderr, done.stderr  # such steps are not preconditioned
    return done.stdout


def tiny_bert(folder: Path, words: list[str], **fields) -> str:
    """A folder with a BERT of one layer, its random weights, and a tokenizer of words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*special, *words]))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder / "model")
    config = BertConfig(
        vocab_size=len(special) + len(words), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    kind = fields.pop("kind", BertModel)
    config.update(fields)
    kind(config).save_pretrained(folder / "model")
    return str(folder / "model")
