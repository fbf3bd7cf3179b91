"""Work of a refresh that fails as a batch is done item by item."""

import pytest
import torch

from hf_precond.optimizers.base.refresh import in_parts


def test_work_that_fails_is_done_in_parts():
    done = []

    def work(items):
        if len(items) > 1:
            raise torch.OutOfMemoryError("out of memory")
        if items[0] == 2:
            raise torch.linalg.LinAlgError("singular")
        done.extend(items)

    assert in_parts(work, [1, 2, 3]) == [(2, "solver")]
    assert done == [1, 3]
    assert in_parts(work, [4]) == [] and done == [1, 3, 4]
    assert in_parts(work, [2]) == [(2, "solver")]


def test_work_on_one_item_is_tried_twice():
    attempts = []

    def work(items):
        attempts.append(items)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("out of memory")

    assert in_parts(work, ["a"]) == [] and attempts == [["a"], ["a"]]


def test_an_error_of_another_kind_is_raised():
    def fails(items):
        raise RuntimeError("expected scalar type Half")

    with pytest.raises(RuntimeError, match="scalar type"):
        in_parts(fails, [1])
