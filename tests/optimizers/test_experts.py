"""Experts are preconditioned one by one, by the tokens that are routed to each."""

import contextlib
import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import hf_precond
from hf_precond.architectures.experts import declare_experts, find_experts, forget_experts
from hf_precond.optimizers.afopt import factors as afopt_factors
from hf_precond.optimizers.afopt import optimizer as afopt_optimizer
from hf_precond.optimizers.nkfac import optimizer as nkfac_optimizer
from hf_precond.statistics import collector
from tests import ranks
from tests.rounding import accelerator

WIDTH, INNER, EXPERTS, TOP = 16, 24, 4, 2
TEXT = {
    "vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": TOP,
}  # fmt: skip
LENGTHS = 7, 4, 6
REAL = sum(LENGTHS)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TEXT, intermediate_size=INNER, num_local_experts=EXPERTS)
    return transformers.MixtralForCausalLM(config).train()


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **TEXT, intermediate_size=INNER, num_local_experts=EXPERTS, sliding_window=4
    )
    model = transformers.GptOssForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


FAMILIES = {"mixtral": mixtral, "gpt_oss": gpt_oss}
EVERY_STEP = {"stat_interval": 1, "inverse_interval": 1}


def batch(number: int = 0, lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    """Token ids, right-padded, with labels for the real tokens only."""
    torch.manual_seed(100 + number)
    ids = torch.randint(3, 40, (len(lengths), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)
    }  # fmt: skip


def collected(optimizer) -> dict:
    """What reaches the optimizer from now on, the last step's by key."""
    found = {}
    update = optimizer.update_statistics

    def record(statistics):
        found.clear()
        found.update({k: (s.sum.clone(), s.count.clone()) for k, s in statistics.items()})
        update(statistics)

    optimizer.update_statistics = record
    return found


def step(model, optimizer, number=0, **fields):
    optimizer.zero_grad()
    model(**(batch(number) | fields)).loss.backward()
    optimizer.step()


# Against separate linear layers ------------------------------------------------------------


class Schedule(nn.Module):
    """In the place of a router: the last expert gets no token before step :attr:`first`."""

    first, step = 5, 0

    def __init__(self, router, gpt):
        super().__init__()
        self.router, self.gpt = router, gpt

    def forward(self, hidden):
        number = hidden.flatten(0, -2).shape[0]
        known = EXPERTS if Schedule.step >= self.first else EXPERTS - 1
        generator = torch.Generator().manual_seed(Schedule.step)
        scores = torch.rand(number, known, generator=generator)
        index = scores.topk(TOP, dim=-1).indices
        weights = torch.rand(number, TOP, generator=generator).to(hidden.dtype)
        return (None, weights, index)


class Listed(nn.Module):
    """The experts of a layer as separate linear layers; without tokens their gradients are zero."""

    def __init__(self, stack):
        super().__init__()
        found = {matrix.weight: matrix.read() for matrix in find_experts(stack)}
        self.gate = [stack._apply_gate]
        sizes = ("gate_up_proj", "down_proj")
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: self._linear(found[name][e], stack) for name in sizes})
            for e in range(EXPERTS)
        )

    @staticmethod
    def _linear(matrix, stack):
        bias = stack.has_bias
        layer = nn.Linear(matrix.shape[1] - bias, matrix.shape[0], bias=bias).to(matrix.dtype)
        with torch.no_grad():
            layer.weight.copy_(matrix[:, : layer.in_features])
            if bias:
                layer.bias.copy_(matrix[:, -1])
        return layer

    def forward(self, hidden, index, weights):
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(index == number)
            if not len(tokens):
                result = result + 0 * sum(parameter.sum() for parameter in expert.parameters())
                continue
            inner = self.gate[0](expert["gate_up_proj"](hidden[tokens]))
            out = expert["down_proj"](inner) * weights[tokens, place, None]
            result.index_add_(0, tokens, out)
        return result


@pytest.mark.parametrize("name", ["afopt", "nkfac"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_stack_is_stepped_as_separate_linear_layers(family, name, chunk, monkeypatch):
    """Also the expert that gets its first token after the first steps, between two refreshes."""
    if chunk is not None:
        for module in (afopt_factors, afopt_optimizer):
            monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(nkfac_optimizer, "GPU_BATCH", chunk)
    stacked = FAMILIES[family]().double()
    stacked.set_experts_implementation("eager")
    for layer in stacked.model.layers:
        router = "router" if family == "gpt_oss" else "gate"
        setattr(layer.mlp, router, Schedule(getattr(layer.mlp, router), family == "gpt_oss"))
    listed = copy.deepcopy(stacked)
    for layer in listed.model.layers:
        layer.mlp.experts = Listed(layer.mlp.experts)
    fields = {"lr": 1e-2, "stat_interval": 2, "inverse_interval": 10}
    optimizers = []
    for model in (stacked, listed):
        optimizer = hf_precond.create_optimizer(model, name, **fields)
        if name == "afopt":  # layers take turns by their numbers, and here there are more of them
            optimizer.plan.phases = dict.fromkeys(optimizer.plan.phases, 0)
        optimizers.append(optimizer)
    for Schedule.step in range(9):
        for model, optimizer in zip((stacked, listed), optimizers, strict=True):
            step(model, optimizer, Schedule.step)
    for one, other in zip(stacked.model.layers, listed.model.layers, strict=True):
        for matrix in find_experts(one.mlp.experts):
            layers = [expert[matrix.weight] for expert in other.mlp.experts.experts]
            expected = torch.stack([
                layer.weight if layer.bias is None
                else torch.cat([layer.weight, layer.bias[:, None]], 1)
                for layer in layers
            ])  # fmt: skip
            torch.testing.assert_close(matrix.read(), expected.detach(), rtol=1e-9, atol=1e-11)


# The statistics themselves -----------------------------------------------------------------


def observed(model) -> list[dict]:
    """The inputs, experts and output gradients of each layer's experts, from their module."""
    calls = []

    def before(module, args, output):
        call = {"module": module, "args": args}
        output.register_hook(lambda gradient: call.update(gradient=gradient))
        calls.append(call)

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(before)
    return calls


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_moments_are_those_of_the_tokens_routed_to_each(family, implementation):
    model = FAMILIES[family]()
    model = model if implementation == "grouped_mm" else model.double()  # it has no float64
    model.set_experts_implementation(implementation)
    optimizer = hf_precond.create_optimizer(model, "nkfac", lr=0.0, **EVERY_STEP)
    found, calls = collected(optimizer), observed(model)
    step(model, optimizer)
    real = batch()["attention_mask"].bool().flatten()
    scale = 2.0**40  # output gradients are multiplied by 2^20 before they are squared
    exact = {"rtol": 1e-4, "atol": 1e-5} if implementation == "grouped_mm" else {}
    for number, call in enumerate(calls):
        stack = call["module"]
        matrices = {m.weight: m.read() for m in find_experts(stack)}
        hidden, index, weights = (tensor.detach() for tensor in call["args"])
        for e in range(EXPERTS):
            tokens, place = torch.where((index == e) & real[:, None])
            first = hidden[tokens]
            if stack.has_bias:
                first = F.pad(first, (0, 1), value=1.0)
            inner = stack._apply_gate(first @ matrices["gate_up_proj"][e].mT)
            inner = F.pad(inner, (0, 1), value=1.0) if stack.has_bias else inner
            delta = call["gradient"][tokens] * weights[tokens, place, None]
            for name, rows, side in (
                ("gate_up_proj", first, "input"),
                ("down_proj", inner, "input"),
                ("down_proj", delta, "output"),
            ):
                total, count = found[f"model.layers.{number}.mlp.experts.{name}.{side}"]
                total = total[e] / (scale if side == "output" else 1)
                torch.testing.assert_close(total, rows.mT @ rows, **exact)
                assert count[e] == len(tokens)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_checkpointed_passes_count_once(implementation, reentrant):
    found = []
    for checkpointed in (False, True):
        model = mixtral()
        model.set_experts_implementation(implementation)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = hf_precond.create_optimizer(model, "nkfac", lr=0.0, **EVERY_STEP)
        found.append(collected(optimizer))
        step(model, optimizer)
    keys = [key for key in found[0] if "experts" in key]
    assert len(keys) == 8
    for key in keys:
        torch.testing.assert_close(found[1][key], found[0][key])


def test_micro_batches_add_up():
    model = mixtral()
    optimizer = hf_precond.create_optimizer(model, "nkfac", lr=0.0, **EVERY_STEP)
    found = collected(optimizer)
    model(**batch(0)).loss.backward()
    model(**batch(1)).loss.backward()
    optimizer.step()
    key = "model.layers.0.mlp.experts.gate_up_proj.input"
    assert found[key][1].sum() == 2 * TOP * REAL
    both = found[key]
    step(model, optimizer, 0)
    first = found[key]
    step(model, optimizer, 1)
    torch.testing.assert_close(both[0], first[0] + found[key][0])


def test_sums_of_single_experts_are_freed_stack_by_stack(monkeypatch):
    """They are as large as all stacks of them, which a step would hold beside."""
    model = mixtral()
    optimizer = hf_precond.create_optimizer(model, "nkfac", lr=0.0, **EVERY_STEP)
    model(**batch()).loss.backward()
    collector = optimizer.statistics
    answers = collector.buffer.answers.items()
    sums = [weakref.ref(held.sum) for key, held in answers if isinstance(key[0], tuple)]
    assert len(sums) >= 2 * 2 * 2 * (EXPERTS - 1)  # layers, stacks, sides
    alive = []
    monkeypatch.setattr(
        collector, "_warn_of_evaluation", lambda: alive.append(sum(s() is not None for s in sums))
    )
    optimizer.step()
    assert alive == [0]


def test_an_expert_without_tokens_keeps_its_average():
    """Its factors, and what it counts, stay as they were; so they do from the start."""
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.gate = Schedule(layer.mlp.gate, False)
    Schedule.step = 0
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-2, **EVERY_STEP)
    step(model, optimizer)
    weight = model.model.layers[0].mlp.experts.down_proj
    state = optimizer.state[weight]
    assert state["input_moment_updates"].tolist() == [1, 1, 1, 0]
    (factor,) = (state[key] for key in state if key.startswith("input_moment_f"))
    torch.testing.assert_close(factor[3], torch.eye(INNER))
    assert not state["input_moment"][3].any()
    before = state["input_moment"].clone()
    Schedule.first, Schedule.step = 0, 7
    step(model, optimizer)
    Schedule.first = 5
    assert state["input_moment_updates"].tolist() == [2, 2, 2, 1]
    assert (state["input_moment"] != before).flatten(1).any(1).all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# Trainings ---------------------------------------------------------------------------------


def _weights_on_ranks(name):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
    model = gpt_oss().double()
    model.set_experts_implementation("eager")
    optimizer = hf_precond.create_optimizer(model, name, lr=1e-2, **EVERY_STEP)
    data = batch()
    for _ in range(3):
        optimizer.zero_grad()
        own = data if rank is None else {k: v[rank::2] for k, v in data.items()}
        logits = model(input_ids=own["input_ids"], attention_mask=own["attention_mask"]).logits
        total = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), own["labels"][:, 1:].flatten(), reduction="sum"
        )
        total.backward()
        if rank is not None:
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["afopt", "nkfac"])
def test_two_ranks_equal_one(name):
    one, two = ranks.run(_weights_on_ranks, name)
    alone = ranks.alone(_weights_on_ranks, name)
    for a, b, expected in zip(one, two, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["afopt", "nkfac"])
def test_a_resumed_run_is_equal_bit_for_bit(name, tmp_path):
    fields = {"lr": 1e-2, "stat_interval": 2, "inverse_interval": 4}
    model = gpt_oss()
    optimizer = hf_precond.create_optimizer(model, name, **fields)
    for number in range(3):
        step(model, optimizer, number)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(model)
    again = hf_precond.create_optimizer(resumed, name, **fields)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for number in range(3, 9):
        step(model, optimizer, number)
        step(resumed, again, number)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["afopt", "nkfac", "muon"])
def test_bfloat16_weights_train(name):
    model = gpt_oss().bfloat16()
    optimizer = hf_precond.create_optimizer(model, name, lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert "unobserved_matrices" not in optimizer.diagnostics()


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_rows_of_an_expert_are_converted_once_chosen(on_accelerator, monkeypatch):
    """As those of other layers: bfloat16 stays bfloat16 where the device sums it in float32."""
    seen = []

    def recorded(tensor, dtype, low=None):
        rows = as_rows(tensor, dtype, low)
        seen.append((len(rows), rows.dtype))
        return rows

    as_rows = collector.as_rows
    monkeypatch.setattr(collector, "as_rows", recorded)
    model = mixtral().bfloat16()
    optimizer = hf_precond.create_optimizer(model, "nkfac", stat_interval=1, stat_rows=2)
    with accelerator() if on_accelerator else contextlib.nullcontext():
        model(**batch()).loss.backward()
    assert seen and max(rows for rows, _ in seen) <= 2
    kept = torch.bfloat16 if on_accelerator else torch.float32
    assert {dtype for _, dtype in seen} == {kept}
    optimizer.close()


def test_adapters_leave_the_experts_frozen():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(mixtral(), config)
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-2)
    assert not optimizer.structure.matrices[0].stack
    routes = {row.name: row.treatment for row in optimizer.routing}
    assert {t for n, t in routes.items() if "experts" in n or ".gate." in n} == {"frozen"}


# What is found -------------------------------------------------------------------------------


def test_experts_and_routers_are_told_apart():
    for name in ("afopt", "nkfac", "muon"):
        for make in FAMILIES.values():
            optimizer = hf_precond.create_optimizer(make(), name, lr=1e-3)
            for row in optimizer.routing:
                if ".experts." in row.name and not (name == "muon" and "bias" in row.name):
                    assert (row.treatment, row.reason) == ("preconditioned", "4 experts")
                if ".gate." in row.name or ".router.weight" in row.name:
                    assert row.treatment == "adamw" and row.reason.startswith("router: ")


class Mixture(nn.Module):
    def __init__(self, width, inner, count):
        super().__init__()
        self.choose = nn.Linear(width, count)
        self.w1 = nn.Parameter(torch.randn(count, width, inner) / width**0.5)
        self.b1 = nn.Parameter(torch.zeros(count, inner))
        self.w2 = nn.Parameter(torch.randn(count, inner, width) / inner**0.5)

    def forward(self, x):
        probability, expert = self.choose(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e in range(len(self.w1)):
            rows = (expert == e).nonzero().squeeze(1)
            inner = (x[rows] @ self.w1[e] + self.b1[e]).relu()
            y = y.index_add(0, rows, inner @ self.w2[e])
        return y * probability.unsqueeze(-1)


@pytest.mark.parametrize("name", ["afopt", "nkfac"])
@pytest.mark.filterwarnings("ignore:afopt. no attention")
def test_declared_experts(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Mixture(6, 4, 3), nn.Linear(6, 2)).double()
    declaration = declare_experts(
        Mixture, weights={"w1": "b1", "w2": None}, transposed=True, routers=("choose",)
    )
    try:
        optimizer = hf_precond.create_optimizer(model, name, lr=1e-3, **EVERY_STEP)
    finally:
        forget_experts(declaration)
    routes = {row.name: row.treatment for row in optimizer.routing}
    assert routes["1.w1"] == routes["1.b1"] == routes["1.w2"] == "preconditioned"
    assert routes["1.choose.weight"] == routes["1.choose.bias"] == "adamw"
    found = collected(optimizer)
    data = torch.randn(20, 5).double()
    model(data).square().sum().backward()
    hidden = model[0](data).detach()
    expert = model[1].choose(hidden).argmax(-1)
    optimizer.step()
    (total, count) = next(found[k] for k in found if k.startswith("1.w1") and "input" in k)
    for e in range(3):
        rows = F.pad(hidden[expert == e], (0, 1), value=1.0)
        torch.testing.assert_close(total[e], rows.mT @ rows)
        assert count[e] == len(rows)


class Flat(Mixture):
    """The same in two dimensions: the experts' matrices one below the other, ``[out, in]``."""

    def __init__(self, width, inner, count):
        super().__init__(width, inner, count)
        del self.b1
        self.count = count
        self.w1 = nn.Parameter(self.w1.detach().mT.flatten(0, 1))
        self.w2 = nn.Parameter(self.w2.detach().mT.flatten(0, 1))

    def forward(self, x):
        probability, expert = self.choose(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        stacks = [weight.view(self.count, -1, weight.shape[1]) for weight in (self.w1, self.w2)]
        for e in range(self.count):
            rows = (expert == e).nonzero().squeeze(1)
            y = y.index_add(0, rows, (x[rows] @ stacks[0][e].T).relu() @ stacks[1][e].T)
        return y * probability.unsqueeze(-1)


@pytest.mark.parametrize("name", ["afopt", "nkfac"])
@pytest.mark.filterwarnings("ignore:afopt. no attention")
def test_fused_weights_are_stepped_as_stacks(name):
    """All experts in the rows of one matrix, against transposed matrices of three dimensions."""
    declarations = [
        declare_experts(Mixture, weights=("w1", "w2"), transposed=True, routers=("choose",)),
        declare_experts("Flat", weights=("w1", "w2"), count="count", routers=("choose",)),
    ]
    found = []
    try:
        for kind in (Mixture, Flat):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 6), kind(6, 4, 3), nn.Linear(6, 2)).double()
            if kind is Mixture:
                model[1].b1.requires_grad_(False)
            optimizer = hf_precond.create_optimizer(model, name, lr=1e-2, **EVERY_STEP)
            generator = torch.Generator().manual_seed(1)
            for _ in range(4):
                optimizer.zero_grad()
                data = torch.randn(20, 5, generator=generator, dtype=torch.float64)
                model(data).square().sum().backward()
                optimizer.step()
            found.append(model[1])
    finally:
        for declaration in declarations:
            forget_experts(declaration)
    stacked, flat = found
    for weight in ("w1", "w2"):
        own = getattr(flat, weight).unflatten(0, (3, -1)).mT
        torch.testing.assert_close(own, getattr(stacked, weight), rtol=1e-9, atol=1e-11)


def test_a_declaration_that_does_not_fit_says_so():
    declaration = declare_experts(Mixture, weights=("w1", "w3"))
    try:
        with pytest.raises(ValueError, match=r"declare_experts: 0 \(Mixture\).*w3 is None"):
            find_experts(nn.Sequential(Mixture(4, 3, 2)))
    finally:
        forget_experts(declaration)
    with pytest.raises(ValueError, match="name the weights"):
        declare_experts("Mixture", weights={"a": None}, transposed=("b",))


def test_narrow_experts_have_factors_in_blocks_or_on_one_side():
    config = transformers.MixtralConfig(
        **(TEXT | {"hidden_size": 64}), intermediate_size=4, num_local_experts=EXPERTS
    )
    model = transformers.MixtralForCausalLM(config).train()
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-2)
    step(model, optimizer)
    shapes = {
        plan.bound.matrix.weight: plan.right.shape
        for plan in optimizer.plan.matrices
        if plan.bound.matrix.stack
    }
    # gate_up: 8 rows, so blocks of at most 32 columns; down: 64 rows.
    assert shapes == {"gate_up_proj": (EXPERTS, 2, 32, 32), "down_proj": (EXPERTS, 4, 4)}
    for name in ("nkfac",):
        optimizer = hf_precond.create_optimizer(model, name, lr=1e-2)
        step(model, optimizer)
        sides = {
            factor.name.split("experts.")[1]
            for factor in optimizer.all_factors()
            if ".0.mlp.experts" in factor.name
        }
        assert sides == {
            "gate_up_proj.output", "gate_up_proj.input", "down_proj.input"
        }  # fmt: skip


def test_padding_is_left_out_of_lists_of_experts():
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=40, d_model=16, d_kv=8, d_ff=12, num_layers=2, num_decoder_layers=2,
        num_heads=2, num_experts=3, expert_capacity=64, decoder_start_token_id=0, pad_token_id=0,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config).train()
    optimizer = hf_precond.create_optimizer(model, "nkfac", lr=0.0, **EVERY_STEP)
    for _ in range(2):  # the second time the mode must still look
        found = collected(optimizer)
        step(model, optimizer, labels=torch.randint(3, 40, (3, 5)))
    counts = {
        tuple(key.split(".mlp.experts.")[1].split("."))[1]: 0.0
        for key in found
        if "encoder" in key and "experts" in key
    }
    for key, (_, count) in found.items():
        if key.startswith("encoder") and ".mlp.experts." in key and key.endswith(".input"):
            counts[key.split(".")[-2]] += float(count)
    assert counts == {"wi": REAL, "wo": REAL}


@pytest.mark.parametrize("name", FAMILIES)
def test_muon_as_the_fallback_steps_each_expert(name: str) -> None:
    """Outside AFOpt's attention, as Muon does."""
    stepped = []
    fields = {"lr": 1e-2, "lr_scale": 1.0, "momentum": 0.8, "nesterov": True}
    for optimizer, more in (("afopt", {"scope": "attention", "base": "muon"}), ("muon", {})):
        model = FAMILIES[name]()
        made = hf_precond.create_optimizer(model, optimizer, **fields, **more)
        model(**batch()).loss.backward()
        made.step()
        stepped.append({n: p.detach() for n, p in model.named_parameters() if p.dim() == 3})
    assert stepped[0]
    for key, weight in stepped[0].items():
        assert torch.equal(weight, stepped[1][key]), key
