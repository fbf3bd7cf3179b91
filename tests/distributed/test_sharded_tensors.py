"""Gathering, sharding again, and looking for numbers that are not finite."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_precond.distributed.collectives import all_finite, full, is_sharded, like
from tests import ranks


def sharded_tensors():
    """What each rank sees of tensors of which one rank holds the bad number."""
    found = {}
    for kind, placements, shape in (
        ("shards", (Shard(0),), (2,)),
        ("replicas of shards", (Replicate(), Shard(0)), (1, 2)),
    ):
        mesh = init_device_mesh("cpu", shape)
        for place in (None, 0, 4):
            # Five rows on two ranks: shards of different size; one row: an empty shard.
            whole = torch.arange(10.0).view(5, 2)
            if place is not None:
                whole[place, 1] = float("nan")
            sharded = distribute_tensor(whole, mesh, placements)
            one = distribute_tensor(torch.ones(1, 2), mesh, placements)
            assert is_sharded(sharded) and sharded.to_local().shape[0] < 5
            assert torch.equal(full(sharded).nan_to_num(), whole.nan_to_num())
            again = like(sharded, whole)
            assert again.placements == sharded.placements
            assert torch.equal(again.to_local().nan_to_num(), sharded.to_local().nan_to_num())
            found[f"{kind}, bad row {place}"] = all_finite([one, sharded])
    dist.barrier()
    return found


@pytest.mark.slow
def test_every_rank_sees_the_bad_number_of_one():
    for found in ranks.run(sharded_tensors):
        assert len(found) == 6
        for key, finite in found.items():
            assert finite is key.endswith("None"), key
