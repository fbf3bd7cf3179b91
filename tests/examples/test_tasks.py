"""The scripts of the other tasks: a few steps each on the shipped data, and what they leave."""

import importlib
import json
import sys

import pytest
import torch

from tests.examples.scripts import EXAMPLES, run_example, tiny_bert

SHORT = ["--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--output_dir", "out"]
WORDS = ["the", "a", "i", "to", "card", "my", "you", "in", "is", "##s"]


@pytest.fixture
def module(monkeypatch):
    """Imports a script, and forgets it and what it shares."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in ("common", "shakespeare", "text_classification", "token_classification", "seq2seq"):
        if name not in before:
            sys.modules.pop(name, None)


def results(folder):
    return json.loads((folder / "out" / "all_results.json").read_text())


@pytest.mark.parametrize(
    "script", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "quickstart.py")
)
def test_a_script_is_short_and_says_how_it_is_called(script):
    text = (EXAMPLES / script).read_text()
    if "def main()" in text:
        assert text.count("\n") <= 150
        assert f"    python examples/{script} " in text
        assert f"| `examples/{script}` |" in (EXAMPLES.parent / "docs" / "examples.md").read_text()


def test_token_classification(tmp_path):
    run_example(
        "token_classification.py", "--do_train", "--do_eval", "--optim", "adamr", *SHORT,
        "--model_name_or_path", tiny_bert(tmp_path, WORDS), "--max_seq_length", "32",
        "--max_eval_samples", "40", folder=tmp_path,
    )  # fmt: skip
    scores = results(tmp_path)
    assert {"eval_overall_f1", "eval_overall_precision", "eval_overall_recall"} <= set(scores)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["id2label"]) == 13 and "B-creative-work" in config["label2id"]


def test_a_word_has_its_tag_at_its_first_token(module, tmp_path):
    import datasets
    from transformers import AutoTokenizer

    script = module("token_classification")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(tmp_path, WORDS))
    rows = {"tokens": [["the", "as", "card"], ["my"]], "ner_tags": [["O", "B-x", "I-x"], ["O"]]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    names = script.tag_names(splits, "ner_tags")
    assert names == ["B-x", "I-x", "O"]
    encoded = script.encode(splits, tokenizer, names, script.TagArguments())["train"]
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])[1:-1] == [
        "the", "a", "##s", "card",
    ]  # fmt: skip
    assert encoded["labels"][:] == [[-100, 2, 0, -100, 1, -100], [-100, 2, -100]]

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-x", "I-x"]))
    splits["train"] = splits["train"].cast_column("ner_tags", tags)
    names = script.tag_names(splits, "ner_tags")
    assert names == ["O", "B-x", "I-x"]
    encoded = script.encode(splits, tokenizer, names, script.TagArguments())["train"]
    assert encoded["labels"][0] == [-100, 0, 1, -100, 2, -100]


def test_causal_lm_lora(tmp_path):
    """The adapter, on the base that lies beside it, is the model that was evaluated."""
    text = (EXAMPLES / "data" / "tinyshakespeare" / "validation.txt").read_text()[:1200]
    own = tmp_path / "own.txt"
    own.write_text(text)
    printed = run_example(
        "causal_lm_lora.py", "--do_train", "--do_eval", "--optim", "afopt", *SHORT,
        "--learning_rate", "1e-2", "--base_steps", "2", "--block_size", "64",
        "--train_file", str(own), "--validation_file", str(own), folder=tmp_path,
    )  # fmt: skip
    assert "trainable params" in printed and "Perplexity" in printed
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert all(b.abs().max() > 0 for name, b in model.named_parameters() if "lora_B" in name)
    ids = torch.tensor(list(text.encode())) + 3  # a byte's token in ByT5
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert loss == pytest.approx(results(tmp_path)["eval_loss"], rel=1e-5)


def test_trl_sft(tmp_path):
    pytest.importorskip("trl")
    run_example(
        "trl_sft.py", "--do_train", "--do_eval", "--optim", "afopt", *SHORT,
        "--base_steps", "0", "--use_peft",
        "--max_train_samples", "20", "--max_eval_samples", "8", "--use_cpu", "--bf16", "false",
        folder=tmp_path,
    )  # fmt: skip
    scores = results(tmp_path)
    assert scores["eval_loss"] > 0 and scores["train_loss"] > 0
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_seq2seq(tmp_path):
    run_example(
        "seq2seq.py", "--do_train", "--do_eval", "--optim", "nkfac", *SHORT,
        "--max_eval_samples", "8", "--max_target_length", "12", folder=tmp_path,
    )  # fmt: skip
    assert results(tmp_path)["eval_exact_match"] == 0  # of two steps
    assert (tmp_path / "out" / "optimizer_config.json").exists()


def test_dates_are_written_in_all_ways(module):
    import datetime

    rows = module("seq2seq").dates(400, 0)
    ways = set()
    for source, target in zip(rows["source"], rows["target"], strict=True):
        for way in ("%B %d, %Y", "%d %b %Y", "%d/%m/%Y", "%b %d %Y"):
            try:
                day = datetime.datetime.strptime(source, way).date()
            except ValueError:
                continue
            assert day.isoformat() == target
            ways.add(way)
    assert len(ways) == 4


def test_sentence_embeddings(tmp_path):
    pytest.importorskip("sentence_transformers")
    run_example(
        "sentence_embeddings.py", "--do_train", "--do_eval", "--optim", "afopt", *SHORT,
        "--model_name_or_path", tiny_bert(tmp_path, WORDS),
        "--max_train_samples", "200", "--max_eval_samples", "40", folder=tmp_path,
    )  # fmt: skip
    scores = results(tmp_path)
    assert 0 <= scores["eval_accuracy"] <= 1 and scores["train_loss"] > 0


def test_accelerate_loop_goes_on_where_it_was(tmp_path):
    """Taken up again after step 5 of 8 it ends with the same weights.

    An epoch has three steps of two batches: the checkpoint is of the middle of one.
    """
    from safetensors.torch import load_file

    model, weights = tiny_bert(tmp_path, WORDS), []
    for words in ([], ["--resume"]):
        printed = run_example(
            "accelerate_loop.py", "--model_name_or_path", model, "--optim", "afopt",
            "--max_train_samples", "22", "--batch_size", "4", "--max_eval_samples", "20",
            "--gradient_accumulation_steps", "2", "--max_steps", "8", "--save_steps", "5",
            "--logging_steps", "2", "--output_dir", "out", *words, folder=tmp_path,
        )  # fmt: skip
        assert printed.count(": loss") == (2 if words else 4) and "accuracy" in printed
        assert ("Resumed after step 5." in printed) == bool(words)
        weights.append(load_file(tmp_path / "out" / "model.safetensors"))
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name
