"""Accuracy as an ``evaluate`` metric module that needs neither the Hub nor scikit-learn."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Accuracy is the share of predictions that equal their reference:
(number of i with predictions[i] == references[i]) / (number of predictions).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): predicted labels.
    references (list of int): true labels.
    normalize (bool): the share of correct predictions if True, their number otherwise.
    sample_weight (list of float, optional): weight of each prediction.

Returns:
    accuracy (float): in [0, 1], or at most the number (the weight) of all
    predictions with normalize=False.
"""


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, normalize=True, sample_weight=None):
        correct = np.equal(predictions, references)
        weight = np.ones(len(correct)) if sample_weight is None else np.asarray(sample_weight)
        total = float((correct * weight).sum())
        return {"accuracy": total / float(weight.sum()) if normalize else total}
