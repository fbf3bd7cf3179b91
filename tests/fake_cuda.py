"""A GPU that torch only pretends to have: tensors have a device, a shape and a dtype, no numbers.

Under ``FakeTensorMode`` torch's own rules say which devices may meet. On top of it, :class:`Watch`
sees every operation: what would be a kernel on the device, in which precision, and what would make
the host wait. :func:`bert_base` counts the steps of an optimizer on a whole model.
"""

import contextlib
import os

import pytest
import torch

from hf_precond.cost.batches import make_batch
from hf_precond.cost.counting import OperationCounter
from hf_precond.cost.trace import on_device, pretended_device, trace_training
from hf_precond.statistics.moments import request_shape
from hf_precond.statistics.requests import Statistic, StatisticsSource

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Their answer is on the host: a number, a shape that depends on the values, an error code.
ANSWERS = {
    aten.nonzero.default, aten.equal.default, aten.is_nonzero.default, aten._linalg_eigh.default,
    aten._linalg_svd.default, aten.masked_select.default, aten._unique2.default,
    aten.repeat_interleave.Tensor, aten._linalg_check_errors.default,
}  # fmt: skip


class Watch(OperationCounter):
    """Counts kernels, and notes what the host would wait for.

    Attributes:
        kernels: name of the operation to its number; a foreach or fused one counts once.
        waits: where in the package the host would wait, and for what.
        number: what a number read from the device turns out to be.
        counts: kernels, operations by precision, bytes.
    """

    def __init__(self, number=1, kind="cuda"):
        super().__init__(kind, number)
        self.waits = []

    def seen(self, function, name, args, kwargs):
        if self._waits(function, args, kwargs):
            self.waits.append(f"{name} at {_place()}")

    def _waits(self, function, args, kwargs):
        if function in ANSWERS or function is aten._local_scalar_dense.default:
            return args[0].is_cuda
        if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            return any(i is not None and (i.dtype == torch.bool or not i.is_cuda) for i in args[1])
        if function is aten._to_copy.default:
            target = kwargs.get("device") or args[0].device
            free = kwargs.get("non_blocking") and (target.type == "cpu" or _pinned(args[0]))
            return target.type != args[0].device.type and not free
        if function is aten.copy_.default:
            target, source = args[:2]
            on_host = target if target.device.type == "cpu" else source
            free = len(args) > 2 and args[2] and _pinned(on_host)
            return target.device.type != source.device.type and not free
        return False

    @property
    def kernels(self):
        return self.counts.by_name()

    @property
    def total(self):
        return len(self.records)


def _pinned(tensor):
    return getattr(tensor, "is_pinned_memory", False)


def _place():
    """The innermost lines of the package that are being run, or call a kernel; not who counts."""
    import traceback

    counting = ("counting.py", "pretended_device.py")
    lines = [
        f
        for f in traceback.extract_stack()
        if f"{os.sep}hf_precond{os.sep}" in f.filename
        and f.name != "kernel"
        and not f.filename.endswith(counting)
    ]
    return " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(lines[-2:]))


@contextlib.contextmanager
def pretended(monkeypatch=None, kind="cuda"):
    """Inside, torch has a GPU, gradients are off, and the driver's calls do nothing."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(pretended_device(kind))
        except NotImplementedError as error:
            pytest.skip(str(error))
        stack.enter_context(torch.no_grad())
        yield


def on_gpu(model, dtype=None, device=GPU):
    """The model with parameters and buffers that only claim to be on the GPU; ties are kept."""
    return on_device(model, device, dtype)


class Source(StatisticsSource):
    """Statistics on the GPU for every request, whenever they are asked for."""

    def __init__(self, requests, device=GPU):
        self.requests, self.device = requests, device

    def take(self):
        return {
            request.key: Statistic(
                torch.empty(request_shape(request), device=self.device),
                torch.empty((), device=self.device),
            )
            for request in self.requests
        }


def with_source(optimizer, device=GPU):
    """The optimizer with statistics from a :class:`Source` instead of the model's passes."""
    requests = optimizer.requests()
    optimizer.close()
    optimizer.statistics = Source(requests, device)
    return optimizer


def step(optimizer, number=1):
    """A step with gradients on the GPU; what was seen of it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    with Watch(number) as watch:
        optimizer.step()
    return watch


def bert_base(name, passes=False, tokens=4096, layers=12, whole_period=True, **fields):
    """A BERT-base for classification, whole, stepped by an optimizer on a pretended H100.

    Args:
        name: the optimizer's, with its fields.
        passes: whether forward and backward are traced too (a second more): then ``collection`` is
            what statistics add to them.
        tokens: of a batch.
        layers: fewer of them are traced sooner.
        whole_period: ``False`` for a plain step alone (3 s instead of 10).

    Returns:
        A :class:`hf_precond.cost.trace.TracedTraining`: ``plain``, ``with_statistics``,
        ``refresh`` and ``average`` are what one ``step()`` runs: ``.launches``, ``.flops`` (by
        precision), ``.share("tf32", "bfloat16", "float16")``, ``.bytes``, ``.by_name()``.
    """
    import transformers

    config = transformers.BertConfig(num_labels=5, num_hidden_layers=layers)
    with pretended_device():
        with torch.device("meta"):
            model = transformers.BertForSequenceClassification(config)
        batch = make_batch(model, tokens, GPU) if passes else None
        fields = {"lr": 1e-3, "whole_period": whole_period, **fields}
        return trace_training(on_device(model, GPU), name, batch, **fields)
