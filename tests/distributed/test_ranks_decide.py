"""What a model decides (AFOpt's ``scope="auto"``), where ranks made it in different ways."""

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_precond.compat.transformers_internals import mark_loaded
from hf_precond.registry import create_optimizer
from tests import ranks
from tests.optimizers.models import batch, make, train_step, weights

pytestmark = pytest.mark.slow


def one_loads(fields):
    """Of two ranks the first marks its weights as loaded; the message of the error, if any."""
    model = make("bert")
    if dist.get_rank() == 0:
        mark_loaded(model.parameters())
    wrapped = DistributedDataParallel(model)
    optimizer = create_optimizer(wrapped, "afopt", head="lr", **fields)
    try:
        train_step(wrapped, optimizer, batch("bert", dist.get_rank()))
        train_step(wrapped, optimizer, batch("bert", dist.get_rank()))
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        optimizer.close()
    return weights(model)


def test_ranks_that_decide_otherwise_are_refused():
    for found, scope in zip(ranks.run(one_loads, {}), ("attention", "all_linear"), strict=True):
        assert found["error"].startswith(f"afopt: this rank's model decided on scope={scope}")


def test_a_scope_that_is_set_needs_no_decision():
    first, second = ranks.run(one_loads, {"scope": "attention"})
    assert all((value == second[name]).all() for name, value in first.items())
