"""F1 of named entities as an ``evaluate`` metric module that needs neither the Hub nor seqeval."""

import datasets
import evaluate

_DESCRIPTION = """
An entity is found if its type and both its ends are right. Tags are O, B-TYPE and I-TYPE; an
entity begins at B-, and at an I- that does not go on with the type before it, as conlleval counts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of lists of str): predicted tags, one list for each sentence.
    references (list of lists of str): true tags.

Returns:
    overall_precision, overall_recall, overall_f1 (float): of the entities of all types, in [0, 1];
    0 where there is nothing to divide by.
    overall_accuracy (float): the share of right tags.
"""


class EntityF1(evaluate.Metric):
    """Precision, recall and F1 of whole entities."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references):
        found = {(row, *e) for row, tags in enumerate(predictions) for e in entities(tags)}
        true = {(row, *e) for row, tags in enumerate(references) for e in entities(tags)}
        pairs = [
            pair
            for rows in zip(predictions, references, strict=True)
            for pair in zip(*rows, strict=True)
        ]
        right = len(found & true)
        precision, recall = right / max(1, len(found)), right / max(1, len(true))
        return {
            "overall_precision": precision,
            "overall_recall": recall,
            "overall_f1": 2 * right / max(1, len(found) + len(true)),
            "overall_accuracy": sum(tag == true_tag for tag, true_tag in pairs)
            / max(1, len(pairs)),
        }


def entities(tags):
    """The entities of a sentence, as (first tag, tag after the last, type)."""
    spans, start, kind = [], 0, None
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind
        if kind is not None and not goes_on:
            spans.append((start, place, kind))
        if not goes_on:
            start, kind = place, name or None
    return spans
