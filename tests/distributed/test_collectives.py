import pytest
import torch

from hf_precond.distributed import collectives
from hf_precond.statistics import requests
from hf_precond.statistics.requests import Statistic
from tests import ranks


def reduce_with_a_rank_that_saw_nothing():
    shapes = {"a": (2, 2), "b": (3,), "c": (1,)}
    staged = {"a": Statistic(torch.full((2, 2), 1.5), torch.tensor(4.0))}
    if collectives.rank() == 1:
        staged = {
            "b": Statistic(torch.arange(3.0), torch.tensor(2.0)),
            "a": Statistic(torch.ones(2, 2), torch.tensor(1.0)),
        }
    reduced = requests.all_reduce_statistics(staged, shapes, torch.float32, torch.device("cpu"))
    return {key: (value.sum, value.count) for key, value in reduced.items()}


def test_statistics_are_summed_over_ranks():
    for result in ranks.run(reduce_with_a_rank_that_saw_nothing):
        assert torch.equal(result["a"][0], torch.full((2, 2), 2.5)) and result["a"][1] == 5
        assert torch.equal(result["b"][0], torch.arange(3.0)) and result["b"][1] == 2
        assert result["c"][0].shape == (1,) and result["c"][1] == 0


def share_squares():
    owner = collectives.assign_owners([5.0, 1.0, 3.0, 3.0])
    tensors = [torch.zeros(2, dtype=d) for d in (torch.float32, torch.float64) * 2]
    for number, (tensor, source) in enumerate(zip(tensors, owner, strict=True)):
        if source == collectives.rank():
            tensor.fill_(number + 1)
    collectives.broadcast_results([[tensor] for tensor in tensors], owner)
    return tensors


def test_every_rank_gets_what_the_owners_computed():
    for result in ranks.run(share_squares):
        assert [tensor.tolist() for tensor in result] == [[n, n] for n in (1.0, 2.0, 3.0, 4.0)]


def share_neighbours():
    """Large pieces: neighbours in memory, of two dtypes, and on one rank apart and transposed."""
    collectives.LARGE, collectives.BUCKET = 64, 96
    room = torch.zeros(60)
    pieces = [list(room.view(10, 6).split([3, 3, 4]))]
    if collectives.rank() == 1:
        pieces = [[torch.zeros(6, 3).T, torch.zeros(3, 6), torch.zeros(6, 4).T]]
    pieces.append([torch.zeros(20), torch.zeros(20, dtype=torch.float64), torch.zeros(2)])
    pieces += [[torch.zeros(5)], [torch.zeros(4)], []]
    owner = [0, 1, 1, 0, 1]
    for number, (piece, source) in enumerate(zip(pieces, owner, strict=True)):
        for place, tensor in enumerate(piece):
            if source == collectives.rank():
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number + place)
    collectives.broadcast_results(pieces, owner)
    return [[tensor.contiguous() for tensor in piece] for piece in pieces]


def test_pieces_arrive_however_they_lie_in_memory():
    first, second = ranks.run(share_neighbours)
    for number, (piece, twin) in enumerate(zip(first, second, strict=True)):
        for place, (tensor, other) in enumerate(zip(piece, twin, strict=True)):
            expected = torch.arange(tensor.numel()).view(tensor.shape) + number + place
            assert torch.equal(tensor, expected.to(tensor)) and torch.equal(other, tensor)


@pytest.mark.parametrize(
    ("costs", "size", "expected"),
    [
        ([5.0, 1.0, 3.0, 3.0], 2, [0, 0, 1, 1]),
        ([1.0, 1.0, 1.0], 1, [0, 0, 0]),
        ([1.0, 8.0, 4.0, 4.0], 3, [1, 0, 1, 2]),
    ],
)
def test_the_costliest_work_goes_first_to_the_least_loaded(costs, size, expected):
    assert collectives.assign_owners(costs, size) == expected


def test_one_rank_talks_to_nobody():
    assert collectives.world_size() == 1 and collectives.rank() == 0
    tensor = torch.ones(2)
    collectives.broadcast_results([[tensor]], [0])
    assert tensor.tolist() == [1.0, 1.0]
