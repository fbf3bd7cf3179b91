"""The task in which a language model writes labels."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_precond.bench import tasks
from hf_precond.bench.generation import answers

WORDS = ["<s>", "</s>", "Text", ":", "Label", "ann", "flew", "by", "train", "air", "rail"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("language")
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(WORDS), num_attention_heads=2, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path):
    rows = [{"text": "ann flew", "label": 0}, {"text": "ann by train", "label": 1}] * 3
    folder = tmp_path / "ways"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "categories.txt").write_text('["by_air", "rail"]')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/validation.txt").write_text("ann flew by train " * 40)
    return str(tmp_path)


def made(language_model, data, **own):
    args = {"model": language_model, "dataset": "ways", "batch_size": 6, "lora_rank": 2} | own
    return tasks.make("label_generation", 1, data, args)


def test_only_the_name_and_the_end_have_labels(language_model, data):
    task = made(language_model, data)
    batch = task.batches(0)
    encode = AutoTokenizer.from_pretrained(language_model)
    rows = {
        encode.decode(ids[: int(mask.sum())]): labels[labels != -100].tolist()
        for ids, mask, labels in zip(*batch.values(), strict=True)
    }
    assert rows == {
        "Text : ann flew Label : by air </s>": [7, 9, 1],
        "Text : ann by train Label : rail </s>": [10, 1],
    }
    trained = [name for name, p in task.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_long_text_is_cut_and_keeps_its_question(language_model, data):
    batch = made(language_model, data, length=1).batches(0)
    encode = AutoTokenizer.from_pretrained(language_model)
    texts = {
        encode.decode(ids[m.bool()])
        for ids, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert texts == {"Text : ann Label : by air </s>", "Text : ann Label : rail </s>"}


def test_exact_is_how_often_greedy_generation_gives_the_answer(language_model, data):
    task = made(language_model, data, lora_rank=0)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=0.03)
    seen = set()
    for step in range(12):
        found = task.figures()
        batch, right = task.batches(step), 0
        for ids, mask, labels in zip(*batch.values(), strict=True):
            ids, asked = ids[mask.bool()], (labels != -100).sum()
            text, answer = ids[:-asked], ids[-asked:]
            task.model.eval()
            written = task.model.generate(
                text[None], do_sample=False, max_new_tokens=int(asked), pad_token_id=1
            )
            right += written[0, len(text) :].tolist() == answer.tolist()
        # All six rows are in each batch and in the evaluation.
        assert found["exact"] == right / 6
        seen.add(right)
        task.model.train()
        optimizer.zero_grad()
        task.loss_of(batch).backward()
        optimizer.step()
    assert len(seen) > 1 and 6 in seen


def test_the_loss_is_the_mean_over_the_answers_tokens(language_model, data):
    task = made(language_model, data, lora_rank=0)
    batch = task.batches(0)
    task.model.eval()
    expected = task.model(**batch).loss.item()
    assert answers(task.model, [batch])["loss"] == pytest.approx(expected, rel=1e-5)
    halves = [
        {name: each[part] for name, each in batch.items()} for part in (slice(2), slice(2, 6))
    ]
    assert answers(task.model, halves)["loss"] == pytest.approx(expected, rel=1e-5)


def test_another_text_is_read_in_blocks(language_model, data):
    found = made(language_model, data, other_text="other").figures()
    model = LlamaForCausalLM.from_pretrained(language_model)
    ids = torch.tensor([5, 6, 7, 8] * 32)[None]  # one whole block of 128 tokens in 160
    with torch.no_grad():
        assert found["other_loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
