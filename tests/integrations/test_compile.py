"""Compiled models: one compilation, and no graph break for the sake of a hook."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from hf_precond.registry import create_optimizer, list_optimizers
from tests.integrations.test_trainer import losses
from tests.integrations.test_trainer import make as make_trainer
from tests.optimizers.models import MODELS, batch, make

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)
# Statistics and probes at steps 0, 4 and 8, whose passes run uncompiled.
EVERY_FOUR = {
    "afopt": {"scope": "all_linear", "stat_interval": 4, "inverse_interval": 4},
    "adamr": {"basis_source": "feature", "stat_interval": 4},
    "muon": {"variant": "normuon"},
    "nkfac": {"stat_interval": 4, "inverse_interval": 4},
    "sgdph": {"probe_interval": 4},
}
WARM = 3


@pytest.fixture(autouse=True)
def anew():
    """Every test compiles anew, and lets others recompile."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("model_name", MODELS)
@each_name
def test_hooks_that_are_not_due_break_no_graph(name, model_name):
    model = make(model_name)
    optimizer = create_optimizer(model, name, **EVERY_FOUR[name])
    if optimizer.statistics is not None:  # Muon collects nothing
        optimizer.statistics.enable(False, 1)
    explained = torch._dynamo.explain(model)(**batch(model_name))
    optimizer.close()
    plain = torch._dynamo.explain(make(model_name))(**batch(model_name))
    # GPT-2's own code breaks its graph once.
    assert plain.graph_break_count == (model_name == "gpt2")
    assert explained.graph_break_count == plain.graph_break_count
    assert explained.graph_count == plain.graph_count


class Recompilations(TrainerCallback):
    """Counts graphs after each step, and lets none be made once the model is warm."""

    def __init__(self):
        self.graphs = []

    def on_step_begin(self, args, state, control, **kwargs):
        torch._dynamo.config.error_on_recompile = state.global_step >= WARM

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"])


def train(name, folder, **fields):
    """A Trainer after training, the graphs after each step, and the graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    pairs = ",".join(f"{key}={value}" for key, value in EVERY_FOUR[name].items())
    trainer = make_trainer(
        name,
        folder,
        **{"optim_args": pairs} | fields,
        max_steps=10,
        learning_rate=5e-3,
    )
    seen = Recompilations()
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.graphs, dict(counters["graph_break"])


@pytest.mark.slow
@each_name
def test_a_compiled_trainer_trains_and_recompiles_nothing_once_warm(name, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    _, stock, _ = train(name, tmp_path, optim="adamw_torch", optim_args=None, **compiled)
    plain, graphs, _ = train(name, tmp_path)
    assert graphs[-1] == 0
    trainer, graphs, broken = train(name, tmp_path, **compiled)
    assert graphs[WARM:] == [graphs[WARM]] * (10 - WARM)
    assert 0 < graphs[WARM] <= stock[WARM]
    assert broken == {}
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-3)
