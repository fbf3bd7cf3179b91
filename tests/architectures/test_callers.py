"""Which projections are called with a tensor of their own, read off the forward."""

import pytest
from torch import nn

from hf_precond.architectures.callers import called_apart


class Same(nn.Module):
    def forward(self, hidden, key_value_states=None):
        current = hidden if key_value_states is None else key_value_states
        return self.q(hidden), self.k(current), self.v(current)


class Positioned(nn.Module):
    def forward(self, hidden, positions=None):
        plain = hidden
        if positions is not None:
            hidden = hidden + positions
        return self.q(hidden), self.k(hidden), self.v(plain)


class Pooled(nn.Module):
    def forward(self, hidden):
        memory = hidden
        if self.ratio > 1:
            memory = self.pool(hidden)
        return self.q(hidden), self.k(memory), self.v(memory)


class Several(nn.Module):
    def forward(self, query, key, value):
        return self.q(query), self.k(key), self.v(value)


class Normed(nn.Module):
    def forward(self, hidden):
        hidden, skipped = self.norm(hidden), hidden
        return self.q(hidden), self.k(hidden), self.v(hidden) + skipped


class Added(nn.Module):
    def forward(self, hidden, positions):
        query = self.q(hidden)
        hidden += positions
        return query, self.k(hidden), self.v(hidden)


class Elsewhere(nn.Module):
    def forward(self, hidden):
        return self.attend(hidden)


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        (Same, ""),
        (Positioned, "v"),
        (Pooled, "k"),
        (Several, "kv"),
        (Normed, ""),
        (Added, "k"),
        (Elsewhere, ""),
    ],
)
def test_what_a_forward_gives_its_projections(kind, apart):
    assert called_apart(kind(), "q", "k", "v") == set(apart)


def test_without_source_nothing_is_apart():
    space: dict = {}
    exec("def forward(self, a, b):\n    return self.q(a), self.k(b), self.v(b)", space)
    kind = type("Made", (nn.Module,), {"forward": space["forward"]})
    assert called_apart(kind(), "q", "k", "v") == set()
