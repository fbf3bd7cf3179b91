"""Steps of a new head: what they change of its outputs, and which heads are new."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

import hf_precond
from hf_precond.architectures.pretrained import find_new_head
from hf_precond.optimizers.base.new_head import MEMORY, MOMENT, SHIFT, TOKENS, moment_is_due
from hf_precond.optimizers.sgdph.optimizer import SGDPH
from hf_precond.statistics.requests import Statistic
from tests.architectures.families import FAMILIES, text

NAMES = hf_precond.list_optimizers()
RHO = 0.04


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A body without a head."""
    path = str(tmp_path_factory.mktemp("body"))
    torch.manual_seed(0)
    config = tf.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=1,
    )  # fmt: skip
    tf.RobertaModel(config).save_pretrained(path)
    return path


def fresh(folder: str, kind: type = tf.RobertaForSequenceClassification) -> nn.Module:
    torch.manual_seed(1)
    return kind.from_pretrained(folder, num_labels=3).train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    probing = isinstance(optimizer, SGDPH)
    with optimizer.curvature_context() if probing else nullcontext():
        loss = model(**text()).loss
        if probing:
            optimizer.probe(loss)
        loss.backward()
    optimizer.step()


def test_new_is_what_the_checkpoint_lacks(folder: str, tmp_path) -> None:
    model = fresh(folder)
    names = ["classifier.dense", "classifier.out_proj"]
    assert [matrix.name for matrix in find_new_head(model)] == names
    model.save_pretrained(tmp_path)
    trained = fresh(str(tmp_path))
    assert find_new_head(trained) == []
    assert find_new_head(tf.RobertaForSequenceClassification(model.config)) == []
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    found = [matrix.name for matrix in find_new_head(get_peft_model(model, lora))]
    within = "base_model.model.classifier.modules_to_save.default"
    assert found == [f"{within}.dense", f"{within}.out_proj"]
    assert find_new_head(get_peft_model(trained, lora)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lr", [1e-5, 1e-2])
def test_a_step_changes_the_outputs_by_what_was_asked(folder: str, name: str, lr: float) -> None:
    """Of each layer, over the inputs that it had: whatever the rate, with and without a bias.

    With one, of what varies from input to input.
    """
    model = fresh(folder)
    if name == "muon":
        model.classifier.out_proj.bias = None
    optimizer = hf_precond.create_optimizer(model, name, lr=lr, head="auto", head_step=RHO)
    layers = {n: getattr(model.classifier, n) for n in ("dense", "out_proj")}
    inputs: list[torch.Tensor] = []
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    before = {n: copy.deepcopy(layer) for n, layer in layers.items()}
    step(model, optimizer)
    for (n, layer), x in zip(layers.items(), inputs[:2], strict=True):
        with torch.no_grad():
            change = layer(x) - before[n](x)
            squares = change.square()
            if layer.bias is not None:  # what varies, and as much as of one token among them
                moved = x @ (layer.weight - before[n].weight).mT
                squares = (change - change.mean(0)).square() + moved.square() / len(x)
        found = squares.mean().sqrt().item()
        torch.testing.assert_close(found, RHO, rtol=1e-4, atol=0)
    assert {r.treatment for r in optimizer.routing if "classifier" in r.name} == {"adamw"}


class Oracle:
    """A layer on centred inputs, ``W (x - μ) + c``, W and c stepped by AdamW's directions."""

    def __init__(self, layer: nn.Linear, rho: float, shift: float) -> None:
        self.weight, self.bias = layer.weight.detach().double(), layer.bias.detach().double()
        self.rho, self.shift, self.steps, self.moments = rho, shift, 0, {}
        self.tokens, self.mean, self.second = 0, 0.0, 0.0

    def look(self, x: torch.Tensor) -> None:
        """What was seen before counts as 64 tokens at most."""
        x, kept = x.detach().double().flatten(0, -2), min(self.tokens, MEMORY)
        self.tokens = kept + len(x)
        self.mean = (kept * self.mean + x.sum(0)) / self.tokens
        self.second = (kept * self.second + x.mT @ x) / self.tokens

    @property
    def covariance(self) -> torch.Tensor:
        return self.second * (1 + 1 / self.tokens) - torch.outer(self.mean, self.mean)

    def direction(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.moments.get(name, (0.0, 0.0))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        self.moments[name] = first, second
        return first / (1 - 0.9**self.steps), (second / (1 - 0.999**self.steps)).sqrt()

    def step(
        self, weight: torch.Tensor, bias: torch.Tensor, decay: float = 0.0, factor: float = 1.0
    ) -> float:
        self.steps += 1
        first, root = self.direction("weight", weight.double() - torch.outer(bias, self.mean))
        trend = min(1.0, (first.norm() / root.norm() * (1.9 / 0.1) ** 0.5).item())
        along = first / (root + 1e-8)
        change = torch.trace(along @ self.covariance @ along.mT) / len(along)
        along = along * factor * self.rho * trend / change.sqrt()
        first, root = self.direction("bias", bias.double())
        constant = factor * self.shift * self.rho * trend * first / (root + 1e-8)
        self.weight = (1 - decay) * self.weight - along
        self.bias = self.bias - (constant - along @ self.mean)
        return trend


def test_steps_are_adamws_of_a_layer_with_centred_inputs(folder: str) -> None:
    """Both layers of the head; gradients that vanish; inputs that are seen at some steps only."""
    model, wd = fresh(folder), 0.1
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-2, head_step=RHO, weight_decay=wd)
    layers = (model.classifier.dense, model.classifier.out_proj)
    oracles = [Oracle(layer, RHO, k) for layer, k in zip(layers, (1.0, SHIFT), strict=True)]
    inputs: dict[nn.Module, torch.Tensor] = {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0]))
    trends = []
    for number, factor in enumerate([1.0] * 3 + [1e-3] * 18):
        optimizer.zero_grad()
        model(**text()).loss.backward()
        for layer, oracle in zip(layers, oracles, strict=True):
            if moment_is_due(number):
                oracle.look(inputs[layer])
            for parameter in layer.parameters():
                parameter.grad *= factor
            trends.append(oracle.step(layer.weight.grad, layer.bias.grad, 1e-2 * wd))
        optimizer.step()
        for layer, oracle in zip(layers, oracles, strict=True):
            for found, wanted in ((layer.weight, oracle.weight), (layer.bias, oracle.bias)):
                torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-4, atol=1e-5)
    assert trends[0] == 1.0 and trends[-1] < 0.9


def test_steps_follow_the_schedule(folder: str) -> None:
    """A warm-up from zero, and a cycle whose rate rises above the group's own."""
    for make, factors in (
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: n / 4), [0, 0.25, 0.5]),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, 10, cycle_momentum=False), None),
    ):
        model = fresh(folder)
        optimizer = hf_precond.create_optimizer(model, "adamr", lr=1e-3, head="auto")
        schedule = make(optimizer)
        layer, inputs = model.classifier.out_proj, []
        oracle = Oracle(layer, RHO, SHIFT)
        layer.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
        for number in range(3):
            factor = optimizer.param_groups[0]["lr"] / 1e-3 if factors is None else factors[number]
            step(model, optimizer)
            oracle.look(inputs[-1])
            oracle.step(layer.weight.grad, layer.bias.grad, factor=factor)
            for found, wanted in ((layer.weight, oracle.weight), (layer.bias, oracle.bias)):
                torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-4, atol=1e-5)
            schedule.step()


def test_groups_with_schedules_of_their_own(folder: str) -> None:
    """Weight and bias in groups whose rates differ: W moves no constant by the bias's rate."""
    model, wd = fresh(folder), 0.1
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": wd},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = hf_precond.create_optimizer(model, "adamr", params=groups, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5, lambda n: 0.0])
    layer, inputs = model.classifier.out_proj, []
    before = copy.deepcopy(layer)
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    step(model, optimizer)
    schedule.step()
    x = inputs[-1]
    with torch.no_grad():
        change = nn.functional.linear(x, layer.weight + 0.5e-3 * wd * before.weight, layer.bias)
        change = change - nn.functional.linear(x, before.weight, before.bias)
    torch.testing.assert_close(change.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_few_or_equal_inputs_make_no_step_long(folder: str, rows: int, equal: bool) -> None:
    """Their covariance is singular, or nothing but rounding."""
    model, generator = fresh(folder), torch.Generator().manual_seed(2)
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-3)
    layer, inputs, first = model.classifier.out_proj, [], model.classifier.out_proj.weight.clone()
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for _ in range(24):
        ids = torch.randint(3, 40, (1 if equal else rows, 9), generator=generator)
        ids, before = ids.expand(rows, -1), copy.deepcopy(layer)
        optimizer.zero_grad()
        model(input_ids=ids, labels=torch.arange(rows) % 3).loss.backward()
        optimizer.step()
        mean = optimizer.state[layer.weight][MOMENT][:-1, -1]
        with torch.no_grad():
            change = layer.weight - before.weight
            moved, varied = (x @ change.mT for x in (inputs[-1], inputs[-1] - mean))
        assert varied.square().mean().sqrt() < 10 * RHO
        assert moved.square().mean().sqrt() < 10 * RHO * rows**0.5
    assert (layer.weight - first).abs().max() > RHO / 4  # trained, from one row a step too


def test_what_has_a_faster_constant_part(folder: str) -> None:
    """Layers that make logits; not what lies below one, nor the output of a regression."""

    def shifts(kind: type, **config: object) -> list[float]:
        torch.manual_seed(1)
        model = kind.from_pretrained(folder, **config)
        optimizer = hf_precond.create_optimizer(model, "muon")
        optimizer.close()
        return list(optimizer.head.shifts.values())

    sequence, tokens = tf.RobertaForSequenceClassification, tf.RobertaForTokenClassification
    assert shifts(sequence, num_labels=3) == [1.0, SHIFT]
    assert shifts(sequence, num_labels=16) == [1.0, SHIFT]  # as wide as the hidden layer
    assert shifts(sequence, num_labels=1) == [1.0, 1.0]
    assert shifts(sequence, num_labels=3, problem_type="regression") == [1.0, 1.0]
    assert shifts(tokens, num_labels=5) == [SHIFT]


def test_a_rate_of_its_own_is_kept(folder: str) -> None:
    model = fresh(folder)
    groups = [
        {"params": model.roberta.parameters()},
        {"params": model.classifier.parameters(), "lr": 3e-3},
    ]
    optimizer = hf_precond.create_optimizer(model, "afopt", groups, lr=1e-3, head="auto")
    assert optimizer.head is None
    for fields in ({"head": "lr"}, {"head_lr_scale": 33.0}):
        assert hf_precond.create_optimizer(model, "afopt", **fields).head is None
    assert hf_precond.create_optimizer(model, "muon").head is not None
    model.roberta.requires_grad_(False)
    assert hf_precond.create_optimizer(model, "adamr").head is None  # a rate means the head's


def test_groups_that_all_have_a_rate_keep_it_at_the_default_too(folder: str) -> None:
    """Also where the head's is the default of the field, as in the recipe."""
    for own, expected in (({"lr": 1e-3}, False), ({}, True)):
        model = fresh(folder)
        body = [p for n, p in model.named_parameters() if not n.startswith("classifier")]
        head = list(model.classifier.parameters())
        groups = [{"params": body, "lr": 2e-5}, {"params": head} | own]
        optimizer = hf_precond.create_optimizer(model, "afopt", params=groups)
        assert (optimizer.head is not None) == expected
        optimizer.close()
    model = fresh(folder)
    alike = [{"params": [p], "lr": 1e-3} for p in model.parameters()]
    optimizer = hf_precond.create_optimizer(model, "afopt", params=alike)
    assert optimizer.head is not None
    optimizer.close()


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_rate_of_zero_moves_nothing(folder: str, rate: float) -> None:
    model = fresh(folder)
    optimizer = hf_precond.create_optimizer(model, "adamr", lr=0.0)
    assert optimizer.head is not None
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = rate
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        step(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    optimizer.close()


def test_a_state_without_the_rule_goes_on_without(folder: str, caplog) -> None:
    """As of an earlier release, which did not know it."""
    model = fresh(folder)
    optimizer = hf_precond.create_optimizer(model, "afopt", head="lr")
    assert "new head" not in caplog.text
    step(model, optimizer)
    state = optimizer.state_dict()
    del state["hf_precond"]["head"]
    resumed = hf_precond.create_optimizer(fresh(folder), "afopt")
    assert "the new head (classifier.dense, classifier.out_proj)" in caplog.text
    resumed.load_state_dict(state)
    assert resumed.head is None


def test_a_head_of_release_0_2_goes_on_and_says_so(folder: str, caplog) -> None:
    model = fresh(folder)
    optimizer = hf_precond.create_optimizer(model, "afopt")
    step(model, optimizer)
    state = optimizer.state_dict()
    for earlier in (False, True):
        if earlier:
            del state["hf_precond"]["head_inputs"]
        resumed = hf_precond.create_optimizer(fresh(folder), "afopt")
        resumed.load_state_dict(state)
        assert resumed.head is not None
        assert ("this state is of release 0.2" in caplog.text) == earlier


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reloaded", [False, True])
def test_a_resumed_head_goes_on(folder: str, tmp_path, name: str, reloaded: bool) -> None:
    """Also where the weights come from the checkpoint's own folder, in which the head is known."""
    model = fresh(folder)
    optimizer = hf_precond.create_optimizer(model, name, lr=1e-3, head="auto")
    for _ in range(3):
        step(model, optimizer)
    model.save_pretrained(tmp_path / "weights")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for _ in range(3):
        step(model, optimizer)
    other = fresh(str(tmp_path / "weights") if reloaded else folder)
    other.load_state_dict(tf.RobertaForSequenceClassification.from_pretrained(
        tmp_path / "weights").state_dict())  # fmt: skip
    resumed = hf_precond.create_optimizer(other, name, lr=1e-3, head="auto")
    assert (resumed.head is None) == reloaded
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert resumed.head is not None and resumed.head.names == optimizer.head.names
    for _ in range(3):
        step(other, resumed)
    for (n, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), n
    with pytest.raises(ValueError, match="was stepped by its outputs"):
        plain = hf_precond.create_optimizer(fresh(folder), name, lr=1e-3, head="lr")
        plain.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))


def test_padding_does_not_count(folder: str) -> None:
    """The input of a token head is that of the tokens that have a label."""
    model = fresh(folder, tf.RobertaForTokenClassification)
    optimizer = hf_precond.create_optimizer(model, "muon", head="auto")
    batch, seen = text("tokens"), []
    batch["labels"] = batch["labels"].clamp(max=2)
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(**batch).loss.backward()
    optimizer.step()
    rows = seen[0][batch["attention_mask"].bool()]
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    found = optimizer.state[model.classifier.weight][MOMENT]
    torch.testing.assert_close(found, rows.mT @ rows / len(rows))


def test_only_tokens_that_the_loss_reads_count(folder: str) -> None:
    """Words that go on have no label."""
    model = fresh(folder, tf.RobertaForTokenClassification)
    optimizer = hf_precond.create_optimizer(model, "muon", head="auto")
    batch, seen = text("tokens"), []
    batch["labels"] = batch["labels"].clamp(max=2)
    batch["labels"][:, 1::2] = -100
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for _ in range(2):  # micro-batches
        model(**batch).loss.backward()
    optimizer.step()
    rows = seen[0][(batch["labels"] != -100) & batch["attention_mask"].bool()]
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    state = optimizer.state[model.classifier.weight]
    torch.testing.assert_close(state[MOMENT], rows.mT @ rows / len(rows))
    assert state[TOKENS] == 2 * len(rows)


def test_of_a_decoder_the_pooled_logits_change_by_what_was_asked(tmp_path) -> None:
    """Its head reads every token, and the loss the last of each sequence."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    tf.LlamaModel(config).save_pretrained(tmp_path)
    model = fresh(str(tmp_path), tf.LlamaForSequenceClassification)
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-4)
    seen: list[torch.Tensor] = []
    model.score.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    before = model.score.weight.detach().clone()
    step(model, optimizer)
    pooled = seen[0][:, -1]  # no token is the padding token, also where the mask is 0
    change = pooled @ (model.score.weight.detach() - before).mT
    torch.testing.assert_close(change.square().mean().sqrt().item(), RHO, rtol=1e-4, atol=0)


def test_padding_does_not_count_where_the_loss_reads_it(folder: str) -> None:
    """The softmax over the positions of a span does."""
    model = fresh(folder, tf.RobertaForQuestionAnswering)
    model.config.num_labels = 2
    model.qa_outputs = nn.Linear(16, 2)
    optimizer = hf_precond.create_optimizer(model, "muon", head="auto")
    batch = {k: v for k, v in text().items() if k != "labels"}
    spans = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([2, 3, 3])}
    model(**batch, **spans).loss.backward()
    optimizer.step()
    assert optimizer.state[model.qa_outputs.weight][TOKENS] == batch["attention_mask"].sum()


class Pooled(nn.Linear):
    """Logits of the first token."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs)[:, 0]


class Attended(nn.Module):
    """What a learned query attends to."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(1, 1, size))
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(inputs), -1, -1)
        return self.attention(key=inputs, query=query, value=inputs)[0][:, 0]


class TwoHeads(tf.RobertaPreTrainedModel):
    def __init__(self, config: tf.RobertaConfig) -> None:
        super().__init__(config)
        self.roberta = tf.RobertaModel(config, add_pooling_layer=False)
        self.pooled = Pooled(config.hidden_size, 3)
        self.attended = Attended(config.hidden_size)
        self.second = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask, labels, weights=(1.0, 1.0)):
        hidden = self.roberta(input_ids, attention_mask)[0]
        logits = self.pooled(hidden), self.second(self.attended(hidden))
        losses = (nn.functional.cross_entropy(each, labels) for each in logits)
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def test_heads_whose_outputs_are_not_their_inputs_row_by_row(folder: str) -> None:
    model = fresh(folder, TwoHeads)
    optimizer = hf_precond.create_optimizer(model, "muon", head="auto")
    projection, inner = model.attended.attention.out_proj, []
    model.second.register_forward_pre_hook(lambda module, args: inner.append(args[0].detach()))
    before = projection.weight.detach().clone(), projection.bias.detach().clone()
    model(**text()).backward()
    optimizer.step()
    entered = torch.linalg.solve(before[0].double(), (inner[0] - before[1]).double().mT).mT
    rows = torch.cat([entered.float(), torch.ones(len(entered), 1)], 1)
    found = optimizer.state[projection.weight][MOMENT]
    torch.testing.assert_close(found, rows.mT @ rows / len(rows), rtol=1e-3, atol=1e-3)
    real = text()["attention_mask"].sum()
    assert optimizer.state[model.pooled.weight][TOKENS] == real


def test_a_head_that_is_trained_later_is_looked_at_then(folder: str) -> None:
    """Its first gradient comes at a step at which heads that are known are not looked at."""
    model = fresh(folder, TwoHeads)
    optimizer = hf_precond.create_optimizer(model, "muon", head="auto")
    before = model.second.weight.detach().clone()
    for step_number in range(7):
        optimizer.zero_grad()
        model(**text(), weights=(1.0, float(step_number % 4 == 3))).backward()
        optimizer.step()
    assert optimizer.state[model.second.weight][TOKENS] == len(text()["labels"])
    assert (model.second.weight - before).norm() > 0


def test_looks_are_rare() -> None:
    assert [n for n in range(101) if moment_is_due(n)] == [0, 1, 2, 4, 8, 16, 20, 40, 60, 80, 100]


def test_a_layer_that_was_not_seen_is_stepped_by_adamw(folder: str) -> None:
    """As in evaluation mode: at the rate, from the first step."""
    model, plain = fresh(folder), fresh(folder)
    batch = FAMILIES["bert"].batch()
    for each, fields in ((model, {}), (plain, {"head": "lr"})):
        each.eval()
        optimizer = hf_precond.create_optimizer(each, "muon", lr=1e-3, **fields)
        each(**batch).loss.backward()
        optimizer.step()
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("broken", [0.0, float("inf")])
def test_without_a_usable_moment_the_head_rests(folder: str, broken: float) -> None:
    """Of inputs that are zero, or not finite, nothing can be told; its next look puts it right."""
    model = fresh(folder)
    optimizer = hf_precond.create_optimizer(model, "muon", lr=1e-3, weight_decay=0.0)
    layer = model.classifier.out_proj
    optimizer.head.source.take = lambda: {
        matrix.name: Statistic(torch.full((matrix.columns,) * 2, broken), torch.tensor(1.0))
        for matrix in optimizer.head.matrices
    }
    before = copy.deepcopy(layer)
    model(**text()).loss.backward()
    optimizer.step()
    assert torch.equal(layer.weight, before.weight) and before.weight.isfinite().all()
    # The bias needs no moment: AdamW's first step is that of the gradient's signs.
    moved = before.bias - layer.bias
    torch.testing.assert_close(moved, SHIFT * RHO * layer.bias.grad.sign(), rtol=1e-4, atol=0)
