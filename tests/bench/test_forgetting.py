"""What features tell of other data."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_precond.bench.forgetting import neighbours_accuracy

KNOWN = [(f"k{n}", "ab"[n % 2]) for n in range(30)]
ASKED = [(f"a{n}", "ab"[n % 3 % 2]) for n in range(12)]


class Body(nn.Module):
    """Two tokens a text; hidden states that the texts' numbers seed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, attention_mask):
        states = [
            torch.randn(3, 4, generator=torch.Generator().manual_seed(int(row[0])))
            for row in input_ids
        ]
        return type("Output", (), {"last_hidden_state": torch.stack(states)})


def tokenizer(texts, **options):
    ids = [[int(t[1:]) + (100 if t[0] == "a" else 0)] * 3 for t in texts]
    masks = [[1, 1, int(t[1:]) % 2] for t in texts]  # the last token of half of them is padding
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def dense_features(rows):
    found = []
    for text, _ in rows:
        number = int(text[1:])
        seed = number + (100 if text[0] == "a" else 0)
        states = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).double().numpy()
        mean = states[: 2 + number % 2].mean(0)
        found.append(mean / np.linalg.norm(mean))
    return np.stack(found)


@pytest.mark.parametrize("column", ["text", "sentence"])
def test_the_votes_of_the_ten_nearest_decide(column):
    known, asked = (
        [{column: text, "label": name} for text, name in rows] for rows in (KNOWN, ASKED)
    )
    cosines, right = dense_features(ASKED) @ dense_features(KNOWN).T, 0
    for row, (_, label) in zip(cosines, ASKED, strict=True):
        votes = {"a": 0.0, "b": 0.0}
        for index in np.argsort(-row)[:10]:
            votes[KNOWN[index][1]] += row[index]
        right += max(votes, key=votes.get) == label
    model = Body().train()
    assert neighbours_accuracy(model, tokenizer, known, asked) == right / len(ASKED)
    assert 0 < right < len(ASKED) and model.training
