import pytest
import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix, Route, RoutingTable, RowSelection


class Transposed(nn.Module):
    """Weight stored [in, out], as GPT-2's Conv1D stores it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def matrices():
    torch.manual_seed(0)
    linear, transposed, conv = nn.Linear(5, 6), Transposed(5, 6), nn.Conv2d(2, 6, (3, 1))
    sectioned = RowSelection(1, (2, 4), 6)
    interleaved = RowSelection(2, (1, 3), 6)
    for module, layout in ((linear, "linear"), (transposed, "transposed"), (conv, "conv")):
        for rows in (None, sectioned, interleaved):
            for bias in (None, "bias"):
                yield LayerMatrix("m", module, bias=bias, layout=layout, rows=rows)


CASES = list(matrices())
IDS = [f"{m.layout}-{m.rows and m.rows.groups}-{m.bias}" for m in CASES]


@pytest.mark.parametrize("matrix", CASES, ids=IDS)
def test_read_is_the_matrix_that_the_layer_applies(matrix):
    inputs = matrix.shape[1]
    unit = torch.eye(inputs)
    with torch.no_grad():
        if matrix.layout == "conv":
            columns = matrix.module(unit.view(inputs, 2, 3, 1)).flatten(1).T
        else:
            columns = matrix.module(unit).T
        columns = columns - matrix.module.bias[:, None]
    picked = list(range(6))
    if matrix.rows is not None:
        picked = [2, 3] if matrix.rows.groups == 1 else [1, 2, 4, 5]
    expected = columns[picked]
    if matrix.bias:
        expected = torch.cat([expected, matrix.module.bias[picked][:, None]], dim=1)
    torch.testing.assert_close(matrix.read(), expected.detach())


@pytest.mark.parametrize("matrix", CASES, ids=IDS)
def test_split_undoes_join(matrix):
    weight, bias = torch.randn(matrix.module.weight.shape), torch.randn(6)
    parts = matrix.split(matrix.join(weight, bias))
    torch.testing.assert_close(parts[0], matrix.target(weight), rtol=0, atol=0)
    if matrix.bias:
        torch.testing.assert_close(parts[1], matrix.bias_view(bias), rtol=0, atol=0)
    else:
        assert parts[1] is None


@pytest.mark.parametrize("matrix", CASES, ids=IDS)
def test_target_changes_the_weight_in_place(matrix):
    weight = torch.zeros(matrix.module.weight.shape)
    matrix.target(weight).add_(1)
    assert weight.sum() == matrix.shape[0] * matrix.shape[1]


def test_complement_holds_the_rows_left():
    chosen = [RowSelection(2, (0, 1), 12), RowSelection(2, (3, 5), 12)]
    rest = RowSelection.complement(chosen)
    assert rest == [RowSelection(2, (1, 3), 12), RowSelection(2, (5, 6), 12)]
    rows = torch.arange(12)
    seen = torch.cat([selection.view(rows).reshape(-1) for selection in chosen + rest])
    assert sorted(seen.tolist()) == list(range(12))


def test_long_names_and_reasons_stay_within_80_columns():
    reason = "in no attention, " * 9 + "whatever"
    table = RoutingTable([Route("layer." * 12 + "weight", (30522, 384), "base", reason, "decay")])
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert f"{reason} [decay]" == " ".join(line.strip() for line in lines[2:-1])


def test_frozen_parameters_are_counted_and_not_listed():
    trained = Route("a.lora_A.weight", (4, 8), "preconditioned", "linear layer")
    frozen = [Route(f"a.{i}.weight", (8, 8), "frozen", "does not train") for i in range(3)]
    lines = str(RoutingTable([*frozen, trained])).splitlines()
    assert lines[1].startswith("a.lora_A.weight") and not any("a.0" in line for line in lines)
    assert lines[-1] == "3 frozen (not listed), 1 preconditioned"
