"""The routing table as a person reads it."""

from hf_precond.architectures.structure import Route, RoutingTable


def test_long_names_and_reasons_stay_within_80_columns():
    reason = "in no attention, " * 9 + "whatever"
    table = RoutingTable([Route("layer." * 12 + "weight", (30522, 384), "base", reason, "decay")])
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert f"{reason} [decay]" == " ".join(line.strip() for line in lines[2:-1])
