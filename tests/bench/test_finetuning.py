"""Tasks that fine-tune an encoder: their batches and their figures."""

import json
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from hf_precond import starting_lr
from hf_precond.bench import optimizers, tasks
from hf_precond.bench.finetuning import calibration_error, matthews, spans, with_adapters

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ann", "flew", "to", "rome", "##s", "today"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    BertTokenizerFast(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(
        BertConfig(vocab_size=len(WORDS), intermediate_size=16, max_position_embeddings=16, **sizes)
    ).save_pretrained(path)
    return str(path)


def written(folder, **splits):
    folder.mkdir()
    for name, rows in splits.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def data(tmp_path):
    texts = [{"sentence": " ".join(WORDS[5 : 6 + n % 4]), "label": f"c{n % 3}"} for n in range(10)]
    written(tmp_path / "texts", train=texts, validation=texts[:4], test=texts[:2])
    tags = {"tokens": ["ann", "flew", "to", "romes"], "ner_tags": ["B-per", "O", "O", "B-loc"]}
    other = {"tokens": ["ann"], "ner_tags": ["O"]}
    written(tmp_path / "tags", train=[tags, other, tags], test=[tags, other])
    return str(tmp_path)


def classification(encoder, data, **own):
    args = {"dataset": "texts", "model": encoder, "batch_size": 4} | own
    return tasks.make("text_classification", 1, data, args)


def test_an_epoch_has_every_row_once_and_pads_to_the_longest(encoder, data):
    task = classification(encoder, data)
    for _ in range(2):
        batches = [task.batches(step) for step in range(3)]
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
        labels = torch.cat([batch["labels"] for batch in batches])
        assert labels.bincount().tolist() == [4, 3, 3]
        for batch in batches:
            lengths = batch["attention_mask"].sum(1)
            assert batch["input_ids"].shape[1] == lengths.max()
            assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"].bool())


def test_rows_are_chosen_alike_for_all_seeds(encoder, data):
    def seen(seed):
        args = {"dataset": "texts", "model": encoder, "train_rows": 4, "batch_size": 4}
        batch = tasks.make("text_classification", seed, data, args).batches(0)
        return sorted(batch["attention_mask"].sum(1).tolist())

    assert seen(1) == seen(2)


def test_figures_of_classes_are_those_of_the_logits(encoder, data):
    task = classification(encoder, data)
    found = task.figures()
    task.model.eval()
    rows = task.evaluate.keywords["rows"]
    assert len(rows) == 4  # of the validation split
    logits = torch.cat([task.model(row["input_ids"][None]).logits for row in rows])
    labels = torch.stack([row["labels"] for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == (logits.argmax(1) == labels).double().mean().item()


def test_only_first_tokens_of_words_have_labels(encoder, data):
    args = {"dataset": "tags", "model": encoder, "batch_size": 3}
    task = tasks.make("token_classification", 1, data, args)
    batch = task.batches(0)
    ids, labels = batch["input_ids"], batch["labels"]
    row = int(batch["attention_mask"].sum(1).argmax())
    # [CLS] ann flew to rome ##s [SEP], tags sorted: B-loc, B-per, O
    assert ids[row].tolist() == [2, 5, 6, 7, 8, 9, 3]
    assert labels[row].tolist() == [-100, 1, 2, 2, 0, -100, -100]
    assert 0 <= task.figures()["f1"] <= 1


def test_a_model_that_knows_the_tags_has_an_f1_of_one(encoder, data):
    args = {"dataset": "tags", "model": encoder}
    task = tasks.make("token_classification", 1, data, args)
    known = {tuple(r["input_ids"].tolist()): r["labels"] for r in task.evaluate.keywords["rows"]}

    class Perfect(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, attention_mask):
            rows = [
                known[tuple(i[m.bool()].tolist())]
                for i, m in zip(input_ids, attention_mask, strict=True)
            ]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).clamp_min(0)
            logits = 9 * torch.nn.functional.one_hot(padded, 3).float()
            return type("Output", (), {"logits": logits})

    assert task.evaluate(Perfect())["f1"] == 1.0


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-a I-a O", [(1, 3, "a")]),
        ("B-a B-a I-b", [(0, 1, "a"), (1, 2, "a"), (2, 3, "b")]),
        ("I-a I-a O I-a", [(0, 2, "a"), (3, 4, "a")]),
        ("O O", []),
    ],
)
def test_spans_are_conllevals(tags, found):
    assert spans(tags.split()) == found


def test_matthews_is_the_formula_of_two_classes():
    found, true = torch.tensor([1, 1, 1, 0, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 0, 1, 1])
    tp, tn, fp, fn = 3, 2, 1, 1
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(found, true) == pytest.approx((tp * tn - fp * fn) / scale, rel=1e-12)
    assert matthews(torch.ones(3, dtype=torch.long), torch.tensor([0, 1, 1])) == 0.0


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    probabilities = torch.tensor([0.9, 0.91, 0.65, 0.6])  # of the first class: bins 13, 13, 9, 9
    logits = torch.stack([probabilities, 1 - probabilities], 1).log()
    right = torch.tensor([0, 1, 0, 0])
    gaps = [abs(1 - 0.9 + 0 - 0.91), abs(1 - 0.65 + 1 - 0.6)]
    assert calibration_error(logits, right) == pytest.approx(sum(gaps) / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("function", "dataset"), [("text_classification", "texts"), ("token_classification", "tags")]
)
def test_adapters_leave_the_body_as_it_is(encoder, data, function, dataset):
    args = {"dataset": dataset, "model": encoder, "lora_rank": 2, "lora_scale": 3.0}
    model = tasks.make(function, 1, data, args).model
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".default")[0].rsplit(".", 1)[1] for name in names} == {
        "lora_A",
        "lora_B",
        "modules_to_save",
    }
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    assert layer.lora_A.default.weight.shape[0] == 2 and layer.scaling == {"default": 3.0}


def test_a_head_of_two_layers_trains_whole(tmp_path):
    """And has no adapters: PEFT knows the names of some heads only."""
    config = DistilBertConfig(
        vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8, num_labels=3
    )
    model = with_adapters(DistilBertForSequenceClassification(config), "SEQ_CLS", 2, 1.0)
    whole = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} - {
        "distilbert"
    }
    assert whole == {"pre_classifier", "classifier"}
    assert not any("lora_" in name and "classifier" in name for name in model.state_dict())


@pytest.mark.parametrize("name", ["lora_plus", "lora_muon", "afopt"])
def test_all_step_the_new_head_by_its_rule(encoder, data, name):
    model = classification(encoder, data, lora_rank=2).model
    assert optimizers.build(model, name, {"lr": 1e-3}, 1).head is not None


def test_features_are_asked_for_other_data(encoder, data):
    task = classification(encoder, data, remembered=["texts"], lora_rank=2)
    assert 0 <= task.figures()["knn_texts"] <= 1


@pytest.mark.parametrize("name", ["afopt", "adamw", "soap"])
def test_a_rate_may_follow_from_weights_and_steps(encoder, data, name):
    model = classification(encoder, data).model
    for steps in (150, 300):
        optimizer = optimizers.build(model, name, {"lr": "auto", "weight_decay": 0.1}, 1, steps)
        assert {group["lr"] for group in optimizer.param_groups} == {starting_lr(model, steps)}
    with pytest.raises(ValueError, match="lr = 'auto' follows from pretrained weights"):
        optimizers.build(torch.nn.Linear(2, 2), name, {"lr": "auto"}, 1, 150)
