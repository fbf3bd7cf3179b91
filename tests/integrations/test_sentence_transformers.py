"""sentence-transformers' trainers, whose losses have weights: all are trained, and resumed."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from hf_precond.integrations.arguments import own_optimizer
from hf_precond.registry import list_optimizers
from tests.integrations.test_trainer import OFTEN, losses
from tests.optimizers.models import weights

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)
SIZES = {
    "vocab_size": 44, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"w{i}": i + 4 for i in range(40)}


def saved(folder, cls, **fields):
    """A tiny BERT and a tokenizer of words, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokens = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[UNK]", model_max_length=16,
    ).save_pretrained(folder)  # fmt: skip
    cls(BertConfig(**SIZES, **fields)).save_pretrained(folder)
    return str(folder)


def pairs(labels):
    """Pairs of sentences of different lengths, so that batches are padded."""
    rows = range(32)
    return datasets.Dataset.from_dict({
        "first": [" ".join(f"w{i * j % 40}" for j in range(1, 3 + i % 3)) for i in rows],
        "second": [" ".join(f"w{i * j % 40}" for j in range(2, 4 + i % 2)) for i in rows],
        "label": [labels(i) for i in rows],
    })  # fmt: skip


def bi_encoder(folder):
    """A SentenceTransformer under SoftmaxLoss, whose classifier is the loss's own."""
    from sentence_transformers import losses as kinds
    from sentence_transformers import models

    path = saved(folder, BertModel)
    model = st.SentenceTransformer(
        modules=[models.Transformer(path), models.Pooling(16)], device="cpu"
    )
    loss = kinds.SoftmaxLoss(model, 16, 3)
    parts = st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments
    return parts, model, loss, pairs(lambda i: i % 3)


def cross_encoder(folder):
    """A CrossEncoder under a loss that is given a weight of its own."""
    from sentence_transformers.cross_encoder import losses as kinds

    class Scaled(kinds.BinaryCrossEntropyLoss):
        """With a temperature that is learnt."""

        def __init__(self, model):
            super().__init__(model)
            self.temperature = nn.Parameter(torch.zeros(()))
            self.bce_loss = nn.BCEWithLogitsLoss()

        def forward(self, inputs, labels, **kwargs):
            return super().forward(inputs, labels, **kwargs) * self.temperature.exp()

    path = saved(folder, BertForSequenceClassification, num_labels=1)
    model = st.CrossEncoder(path, num_labels=1, device="cpu")
    parts = (
        st.cross_encoder.CrossEncoderTrainer, st.cross_encoder.CrossEncoderTrainingArguments
    )  # fmt: skip
    return parts, model, Scaled(model), pairs(lambda i: float(i % 2))


def sparse_encoder(folder):
    """A SPLADE under losses that hold it twice, one of which is given a weight of its own."""
    from sentence_transformers.sparse_encoder import losses as kinds
    from sentence_transformers.sparse_encoder import models

    class Projected(kinds.SparseMultipleNegativesRankingLoss):
        """With a scale that is learnt."""

        def __init__(self, model):
            super().__init__(model)
            self.sharpness = nn.Parameter(torch.zeros(()))

        def compute_loss_from_embeddings(self, *args, **kwargs):
            return super().compute_loss_from_embeddings(*args, **kwargs) * self.sharpness.exp()

    path = saved(folder, BertForMaskedLM)
    model = st.SparseEncoder(
        modules=[models.MLMTransformer(path), models.SpladePooling("max")], device="cpu"
    )
    loss = kinds.SpladeLoss(model, Projected(model), document_regularizer_weight=1e-3)
    parts = (
        st.sparse_encoder.SparseEncoderTrainer, st.sparse_encoder.SparseEncoderTrainingArguments
    )  # fmt: skip
    return parts, model, loss, pairs(lambda i: 0.0).remove_columns("label")


KINDS = {"bi-encoder": bi_encoder, "cross-encoder": cross_encoder, "sparse encoder": sparse_encoder}
each_kind = pytest.mark.parametrize("kind", KINDS)
# A learning rate of the loss's own, by sentence-transformers' arguments.
RATES = {
    "bi-encoder": r"^classifier", "cross-encoder": "temperature", "sparse encoder": "sharpness",
}  # fmt: skip


def trained(name, kind, folder, run, checkpoint=None, **fields):
    """A trainer after four steps, its model and its loss."""
    (trainer_cls, args_cls), model, loss, data = KINDS[kind](folder / "model")
    own = {
        "optim": name, "optim_args": OFTEN[name], "max_steps": 4, "logging_steps": 1,
        "per_device_train_batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.1,
        "learning_rate_mapping": {RATES[kind]: 1e-2}, "lr_scheduler_type": "constant",
        "report_to": [], "save_strategy": "steps", "save_steps": 2, "use_cpu": True,
        "disable_tqdm": True, "save_only_model": False,
    }  # fmt: skip
    args = args_cls(str(folder / run), **own | fields)
    before = weights(loss)
    trainer = trainer_cls(model, args, train_dataset=data, loss=loss)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, loss, before


@each_kind
@each_name
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_weight_of_model_and_loss_is_trained_at_its_rate(name, kind, tmp_path):
    trainer, loss, before = trained(name, kind, tmp_path, "run", save_strategy="no")
    own = own_optimizer(trainer.optimizer)
    held = {id(p): group for group in own.param_groups for p in group["params"]}
    for key, parameter in loss.named_parameters():
        group = held[id(parameter)]
        special = any(mark in key for mark in ("classifier", "temperature", "sharpness"))
        special = special and not (kind == "cross-encoder" and "classifier" in key)
        assert group["lr"] == (1e-2 if special else 1e-3), key
        decays = "bias" not in key and "LayerNorm" not in key
        assert group["weight_decay"] == (0.1 if decays else 0.0), key
        if parameter.grad is not None and parameter.grad.any():
            assert not torch.equal(before[key], parameter), key
    moved = [key for key, p in loss.named_parameters() if not torch.equal(before[key], p)]
    assert any(RATES[kind].strip("^") in key for key in moved)
    treated = own.routing.count()
    assert treated["preconditioned"] >= 4 and "not stepped" not in treated
    assert "unobserved_matrices" not in own.diagnostics()
    assert len(losses(trainer)) == 4


@pytest.mark.slow
@each_kind
@each_name
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_resumed_run_is_bit_equal(name, kind, tmp_path):
    """The Trainer saves the model alone: where the loss has weights, these are handed over."""
    whole, *_ = trained(name, kind, tmp_path, "run")
    half = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert half["param_groups"][0]["step"] == 2
    again, *_ = trained(
        name, kind, tmp_path, "again", str(tmp_path / "run" / "checkpoint-2"),
        learning_rate_mapping={RATES[kind]: 1e-2},
    )  # fmt: skip
    first, second = own_optimizer(whole.optimizer), own_optimizer(again.optimizer)
    assert second.steps == first.steps == 4
    assert first.state_dict()["hf_precond"] == second.state_dict()["hf_precond"]
