"""Exact match as an ``evaluate`` metric module that does not need the Hub."""

import datasets
import evaluate

_DESCRIPTION = """
Exact match is the share of texts that equal their reference, character by character.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): generated texts.
    references (list of str): what they should be.

Returns:
    exact_match (float): in [0, 1].
"""


class ExactMatch(evaluate.Metric):
    """The share of texts that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        return {"exact_match": sum(found == true for found, true in pairs) / len(pairs)}
