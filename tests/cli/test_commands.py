"""``hf-precond list`` and ``hf-precond explain``."""

import contextlib
import dataclasses
import itertools
import os
import re
import subprocess
import sys

import pytest
from transformers import AutoConfig, BertConfig, BertModel, GPT2Config, ViTConfig

from hf_precond.architectures.structure import Route
from hf_precond.cli.explain import routing_table
from hf_precond.cli.fields import field_table
from hf_precond.cli.main import launch, main
from hf_precond.cli.text import distinct, terminal_width
from hf_precond.config.base import OptimizerConfig, one_of
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
def test_the_starting_rate_is_shown_where_an_optimizer_is_chosen(name, tmp_path, capsys):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    config.save_pretrained(tmp_path)
    start = f"learning rate: {get_info(name).start} from scratch; leave it unset to fine-tune\n"
    assert main(["list", name]) == 0
    assert start in capsys.readouterr().out
    assert main(["explain", str(tmp_path), "--optim", name]) == 0
    assert capsys.readouterr().out.endswith(start)


@each_name
def test_list_of_one_shows_every_field_with_default_and_meaning(name, capsys):
    assert main(["list", name]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    config_cls = get_info(name).config_cls
    entries = re.findall(r"^(\w+) +(\S+)\n((?:    .*\n?)+)", shown, re.MULTILINE)
    described = {field: (default, " ".join(text.split())) for field, default, text in entries}
    assert set(described) == {field.name for field in dataclasses.fields(config_cls)}
    fields = config_cls._fields()
    for field, (default, text) in described.items():
        assert config_cls.from_strings({field: default}) == config_cls()
        assert "`" not in text
        if fields[field].choices:  # its description names them
            assert "one of" not in text
            assert set(fields[field].choices) <= {*re.findall(r"\w+", text)}
            continue
        legal, _, meaning = text.partition(": ")
        assert len(meaning) > 10 and meaning[-1] == "."
        assert legal.startswith(("a number in", "an integer in", "True or", "two num"))
    assert "Args:" not in shown and "Default" not in shown


def test_choices_that_a_description_leaves_out_are_listed():
    @dataclasses.dataclass(frozen=True)
    class Terse(OptimizerConfig):
        """Terse.

        Args:
            form: the ``long`` one, or a shorter. Default ``None``.
        """

        form: str | None = one_of("long", "short")

    shown = field_table(Terse, 80)
    assert "    one of long, short or None: the long one, or a shorter.\n" in shown


def test_ranges_are_those_of_the_config(capsys):
    main(["list", "adamr"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "basis_tolerance 0.01 a number in [0, 1]: a basis is left" in shown
    assert "basis auto auto (two-sided while that is cheap, else one-sided), two_sided, " in shown
    assert "basis_interval 3 an integer in [1, infinity): steps between" in shown


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
        (
            ["explain", "{model}", "--optim", "afopt", "--device", "h1000"],
            "h200, h100, a100, l4, t4",
        ),
        (["explain", "{model}", "--optim", "afopt", "--tokens", "64"], "add --device"),
        (
            ["explain", "{model}", "--optim", "afopt", "--device", "h100", "--tokens", "0"],
            "--tokens 0",
        ),
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
    assert "{0..23}.attention.self.query.{weight,bias}" in shown
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
    words = ["explain", str(tmp_path), "--optim", name, "--auto_class", "AutoModel", "--all"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    import torch

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    for parameter, _ in model.named_parameters():
        assert parameter[-41:] in shown


@pytest.mark.parametrize("weights", [False, True])
def test_explain_shows_what_fine_tuning_would_do_where_there_are_weights(weights, tmp_path, capsys):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    (BertModel(config) if weights else config).save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--optim", "afopt"]) == 0
    shown, told = capsys.readouterr()
    assert ("outside scope=attention (auto, of a model that was loaded)" in shown) == weights
    assert "afopt:" not in told


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
    shown, formula, _ = capsys.readouterr().out.splitlines()[-3:]
    assert formula.strip() == get_info(name).memory and len(formula) <= 80
    assert shown.endswith("; numbers for a weight [m, n]:") and len(shown) <= 80

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
    assert "2m?" in done.stdout and "encoder.layer.0" in done.stdout


def test_explain_predicts_what_a_step_costs(tmp_path, capsys):
    BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, architectures=["BertForSequenceClassification"],
    ).save_pretrained(tmp_path)  # fmt: skip
    device = tmp_path / "small.toml"
    device.write_text('name = "small"\nbandwidth = 100\n[peak]\nfloat32 = 1\nbfloat16 = 2\n')
    words = ["explain", str(tmp_path), "--optim", "muon"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--device", str(device), "--tokens", "64", "--length", "16"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(plain.rstrip())
    added = shown[len(plain.rstrip()) :]
    assert max(map(len, added.splitlines())) <= 80
    assert "predicted, not measured: small" in added and "64 tokens a step" in added
    assert "times as long" in added and "launches" in added


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


def test_a_command_that_is_misspelt_is_told_by_the_launcher_too(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        launch(["lst"])
    assert stopped.value.code == 2 and "did you mean 'list'?" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [main, launch])
def test_version(entry, capsys):
    with pytest.raises(SystemExit) as ended:
        entry(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hf_precond {version()}\n"


@pytest.mark.parametrize("command", ["", "run", "list", "explain", "compare", "doctor"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"] if command else ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "usage: hf-precond" in shown
    assert f"\n  hf-precond {command}" in shown and max(map(len, shown.splitlines())) <= 80


ROUTES = [
    ("embed.weight", (100, 8), "adamw", "embedding", "decay"),
    *((f"layers.{i}.q.weight", (8, 8), "preconditioned", "queries", "decay") for i in range(3)),
    *((f"layers.{i}.q.bias", (8,), "preconditioned", "queries", "no decay") for i in range(3)),
    *((f"layers.{i}.experts.{j}.up.weight", (16, 8), "preconditioned", "expert", "decay")
      for i in (0, 2) for j in range(2)),
    ("layers.1.experts.0.up.weight", (8, 8), "preconditioned", "expert", "decay"),
    ("head.weight", (2, 8), "adamw", "output head", "head decay"),
    ("frozen.weight", (4, 2), "frozen", "does not train", ""),
]  # fmt: skip


def test_like_layers_are_one_row_with_counts_and_shares():
    routes = [Route(*route) for route in ROUTES]
    lines = [" ".join(line.split()) for line in routing_table(routes, False, 80).splitlines()]
    total = 800 + 3 * 72 + 4 * 128 + 64 + 16 + 8
    assert lines == [
        "shape tensors weights",
        f"preconditioned 11 {100 * (216 + 576) / total:.1f} %",
        "queries",
        f"layers.{{0..2}}.q.{{weight,bias}} 8x8 6 {100 * 216 / total:.1f} %",
        "expert",
        f"layers.{{0,2}}.experts.{{0..1}}.up.weight 16x8 4 {100 * 512 / total:.1f} %",
        f"layers.1.experts.0.up.weight 8x8 1 {100 * 64 / total:.1f} %",
        "",
        f"adamw 2 {100 * 816 / total:.1f} %",
        "embedding",
        f"embed.weight 100x8 1 {100 * 800 / total:.1f} %",
        "output head [head decay]",
        f"head.weight 2x8 1 {100 * 16 / total:.1f} %",
        "",
        f"frozen 1 {100 * 8 / total:.1f} %",
        "does not train",
        f"frozen.weight 4x2 1 {100 * 8 / total:.1f} %",
    ]


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("width", [80, 120])
def test_rows_fit_the_terminal_and_names_stay_distinct(every_row, width):
    parts = itertools.product(("encoder", "decoder"), range(12), ("query", "key"))
    form = "model.{}.blocks.{}.self_attention.{}_projection.inner.weight"
    names = [form.format(*part) for part in parts]
    routes = [Route(name, (8, 8), "preconditioned", name.split("_")[1], "decay") for name in names]
    lines = routing_table(routes, every_row, width).splitlines()
    assert max(map(len, lines)) <= width
    shown = [line.split()[0] for line in lines if line.startswith("    ") and "8x8" in line]
    assert len(shown) == len(set(shown)) == (48 if every_row else 4)


@pytest.mark.parametrize(("columns", "width"), [(None, 80), ("100", 100), ("20", 60), ("999", 160)])
def test_the_width_is_the_terminals(columns, width, monkeypatch):
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr(sys, "__stdout__", None)  # no terminal
    else:
        monkeypatch.setenv("COLUMNS", columns)
    assert terminal_width() == width


def test_names_that_no_cut_keeps_apart_stay_whole():
    names = [f"aaaaaaaaaa{i}bbbbbbbbbb" for i in range(3)]
    assert distinct(names, 8) == {name: name for name in names}
    assert distinct(names, 21) == {name: name for name in names}
    cut = distinct(names, 14)
    assert len(set(cut.values())) == 3 and all(len(value) == 14 for value in cut.values())
