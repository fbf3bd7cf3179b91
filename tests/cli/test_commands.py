"""``hf-precond list`` and ``hf-precond explain``."""

import contextlib
import dataclasses
import os
import subprocess
import sys

import pytest
from transformers import AutoConfig, BertConfig, GPT2Config, ViTConfig

from hf_precond.cli.main import launch, main
from hf_precond.config.hub import version
from hf_precond.registry import create_optimizer, get_info, list_optimizers

each_name = pytest.mark.parametrize("name", list_optimizers())


def test_list_shows_every_optimizer_with_its_line(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, list_optimizers(), strict=False):
        assert line.split(maxsplit=1) == [name, get_info(name).description]
    assert max(map(len, lines)) <= 80


@each_name
def test_list_of_one_shows_every_field_with_default_and_meaning(name, capsys):
    assert main(["list", name]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    config_cls = get_info(name).config_cls
    table = dict(line.split() for line in shown.splitlines()[3:] if len(line.split()) == 2)
    for field in dataclasses.fields(config_cls):
        assert config_cls.from_strings({field.name: table[field.name]}) == config_cls()
        assert f"{field.name}:" in shown or f"{field.name}," in shown, "no documentation"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "afop"], "did you mean 'afopt'?"),
        (["explain", "{model}", "--optim", "afop"], "did you mean 'afopt'?"),
        (["explain", "{model}", "--optim", "afopt", "--optim_args", "dampin=1"], "'damping'"),
        (["list", "AFOPT"], "did you mean 'afopt'?"),
        (["explain", "{model}/nowhere", "--optim", "afopt"], "nowhere"),
        (["explain", "nobody/nowhere", "--optim", "afopt"], "nobody/nowhere"),
        (["run", "--optim", "afopt", "train.py"], "--optim stands before the script"),
        (["explain", "{model}", "--optim", "afopt", "--auto_class", "Trainer"], "--auto_class"),
        (
            ["explain", "{model}", "--optim", "afopt", "--optim_args", "config=nowhere"],
            "hf_precond: --optim_args config=nowhere: nowhere: there is no such folder",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, message, tmp_path, capsys):
    BertConfig().save_pretrained(tmp_path)
    assert main([word.format(model=tmp_path) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("hf_precond: ") and message in shown.err


def test_explain_takes_a_config_alone_and_makes_no_weights(tmp_path, capsys, monkeypatch):
    config = BertConfig(
        hidden_size=4096, num_hidden_layers=24, num_attention_heads=32, intermediate_size=16384,
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    words = ["explain", str(tmp_path), "--optim", "afopt", "--optim_args", "head_lr_scale=5"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("preconditioned") >= 24 * 4
    assert "classifier.weight" in shown and "head decay" in shown


@each_name
@pytest.mark.parametrize(
    "config",
    [BertConfig(num_hidden_layers=2), GPT2Config(n_layer=2), ViTConfig(num_hidden_layers=2)],
    ids=["bert", "gpt2", "vit"],
)
def test_explain_names_every_parameter(name, config, tmp_path, capsys):
    from transformers import AutoModel

    config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--optim", name, "--auto_class", "AutoModel"]) == 0
    shown = capsys.readouterr().out
    import torch

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    for parameter, _ in model.named_parameters():
        assert parameter[-41:] in shown


@each_name
def test_explain_tells_the_memory_that_a_step_takes(name, tmp_path, capsys):
    import torch
    from transformers import BertForSequenceClassification

    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=300,
        vocab_size=1000, max_position_embeddings=32,
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--optim", name]) == 0
    shown, formula = capsys.readouterr().out.splitlines()[-2:]
    assert formula.strip() == get_info(name).memory and len(formula) <= 80

    model = BertForSequenceClassification(config)
    optimizer = create_optimizer(model, name)
    with getattr(optimizer, "curvature_context", contextlib.nullcontext)():
        loss = model(torch.arange(12).view(2, 6), labels=torch.tensor([0, 1])).loss
        if name == "sgdph":
            optimizer.probe(loss)
        loss.backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    kept = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert shown.startswith(f"state: {kept / 2**20:.1f} MiB, {kept / (8 * weights):.2f} of AdamW's")
    optimizer.close()


def test_a_terminal_that_is_not_unicode_shows_the_table(tmp_path):
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    words = [sys.executable, "-m", "hf_precond", "explain", str(tmp_path), "--optim", "adamr"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    assert "2m?" in done.stdout and "encoder.layer.0.attention" in done.stdout


@pytest.mark.parametrize("command", ["list", "explain"])
def test_a_reader_that_has_seen_enough_is_no_error(command, tmp_path, capsys, monkeypatch):
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        words = [str(tmp_path), "--optim", "nkfac"] if command == "explain" else []
        assert main([command, *words]) == 0
    assert capsys.readouterr().err == ""


def test_the_commands_work_behind_python_m_too(capsys):
    assert launch(["list"]) == 0
    assert "afopt" in capsys.readouterr().out


def test_a_script_named_like_a_command_runs(tmp_path, capsys, monkeypatch):
    (tmp_path / "list").write_text("print('the script ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", [])
    assert launch(["list"]) == 0
    assert capsys.readouterr().out == "the script ran\n"


@pytest.mark.parametrize("entry", [main, launch])
def test_version(entry, capsys):
    with pytest.raises(SystemExit) as ended:
        entry(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hf_precond {version()}\n"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["explain", "--help"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0 and "usage: hf-precond" in capsys.readouterr().out
