"""GradCache of sentence-transformers under SGD-PH, against the loss that it computes in parts."""

import random
import warnings

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_precond.integrations.arguments import own_optimizer

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
    models,
)
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models

pytestmark = pytest.mark.slow


def folder_with_a_bert(folder):
    special = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    words = {f"w{number}": number + 4 for number in range(40)}
    made = Tokenizer(token_models.WordLevel(special | words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=40, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def curvature(bert, cached, folder):
    model = SentenceTransformer(modules=[models.Transformer(bert), models.Pooling(16)])
    plain = losses.MultipleNegativesRankingLoss(model)
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2) if cached else plain
    text = [" ".join(f"w{(i * j) % 40}" for j in range(1, 7)) for i in range(1, 17)]
    random.seed(0)
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            str(folder), optim="sgdph", max_steps=1, per_device_train_batch_size=16, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, seed=1,
        ),
        train_dataset=Dataset.from_dict({"anchor": text, "positive": [t + " w1" for t in text]}),
        loss=loss,
    )  # fmt: skip
    trainer.train()
    own = own_optimizer(trainer.optimizer)
    norms = own.structure.norms
    return torch.cat([own.state[norm.parameter]["curvature"].flatten() for norm in norms])


def test_the_cached_loss_has_the_curvature_of_the_plain_one(tmp_path):
    bert = folder_with_a_bert(tmp_path / "bert")
    exact = curvature(bert, False, tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = curvature(bert, True, tmp_path)
    assert [w for w in said if "compute_loss is run again" in str(w.message)]
    assert (found - exact).norm() / exact.norm() < 2e-3
