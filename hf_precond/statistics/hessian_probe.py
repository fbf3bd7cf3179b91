"""Curvature of the norm parameters by Hessian-vector products of the training loss."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.compat import accelerate_internals
from hf_precond.compat.torch_internals import Hook
from hf_precond.statistics.double_backward import DoubleBackward, FullPrecision
from hf_precond.statistics.hessian_products import (
    DifferenceProduct,
    GraphProduct,
    depends_on,
    diagonal_estimates,
    probe_vectors,
    recomputes,
)
from hf_precond.statistics.requests import CurvatureRequest, CurvatureSource, Statistic

NO_LOSS = (
    "sgdph: step {step} is due for a Hessian-vector product, and no loss of this model was seen "
    "since the last step. In a plain loop run forward and backward inside "
    "`with optimizer.curvature_context():` and call optimizer.probe(loss) before loss.backward(); "
    "zero_grad() must not come between probe and step. With Accelerate call "
    "accelerator.backward(loss)."
)
NOT_TWICE = (
    "sgdph: the training graph cannot be differentiated twice ({error}). Fused attention: load the "
    "model with attn_implementation='sdpa' or 'eager', and run the forward pass inside "
    "optimizer.curvature_context(). Reentrant checkpointing: pass use_reentrant=False. Compiled or "
    "fused kernels: switch them off, or in a plain loop give optimizer.probe a function that "
    "returns the loss: optimizer.probe(lambda: loss_function(model(x), y))."
)
SHARDED = (
    "sgdph: the model is sharded (FSDP2, or parameters that are DTensors), and its backward pass "
    "cannot be differentiated; train with DDP (torchrun), or choose afopt, adamr or nkfac."
)


def open_probe(model: nn.Module, requests: Sequence[CurvatureRequest]) -> CurvatureProbe:
    """The source of the curvature of norm parameters, its hooks installed.

    Args:
        model: the root of what is trained, inside any wrapper.
        requests: what to probe.
    """
    return CurvatureProbe(model, requests)


def _weakly(method: Callable[..., Any]) -> Hook:
    """A hook that holds its source weakly, and does nothing while compiled code is made."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        held = reference()
        return None if held is None else held(*args)

    return Hook(call)


def _nothing() -> None:
    return None


def _leave(handles: Sequence[Any], switches: DoubleBackward) -> None:
    """What :meth:`CurvatureProbe.close` undoes, also when it is collected as garbage."""
    for handle in handles:
        handle.remove()
    switches.release()
    accelerate_internals.stop()


class CurvatureProbe(CurvatureSource):
    """Stages estimates of the Hessian diagonal on the steps that are due.

    It sees the loss through ``Accelerator.backward`` or :meth:`observe`. On
    the steps that are due, the model's forward pass switches attention to a
    kernel that can be differentiated twice, until the backward pass is done,
    and runs outside autocast unless the requests allow it.

    Args:
        model: the root of what is trained.
        requests: what to probe; one estimator for all.
    """

    def __init__(self, model: nn.Module, requests: Sequence[CurvatureRequest]) -> None:
        self.model = model
        self.requests = list(requests)
        self.due = False
        self.step = 0
        self.staged: dict[str, Statistic] = {}
        self.vectors: dict[str, Tensor] = {}
        self.seen: list[Callable[[], Any]] = []
        self.by_differences = False
        self.versions: list[int] = []
        self.switches = DoubleBackward(model)
        self.precision = FullPrecision(model)
        # Children too: some trainers call a part of the model and never its root.
        handles: list[Any] = []
        for module in (model, *model.children()):
            before, after = _weakly(self.before_forward), _weakly(self.after_forward)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        accelerate_internals.listen(self)
        self._leave = weakref.finalize(self, _leave, handles, self.switches)
        self._leave.atexit = False

    # What the optimizer calls -------------------------------------------------

    def enable(self, due: bool, step: int) -> None:
        """Collect (or not) in the passes before step number ``step``."""
        self.due = due and any(step % r.period == r.phase for r in self.requests)
        self.step = step
        self.vectors = {}
        self.precision.expect()
        self.switches.expect(self.due)

    def take(self) -> dict[str, Statistic]:
        """What was staged; the stage is empty afterwards.

        Raises:
            RuntimeError: products were due and no loss was seen.
        """
        self.switches.release()
        if self.due and not self.seen and self._requests():
            raise RuntimeError(NO_LOSS.format(step=self.step))
        staged = self.staged
        self.drop()
        return staged

    def drop(self) -> None:
        """Forget what was staged."""
        self.staged = {}
        self.seen = []
        self.by_differences = False
        self.versions = []

    def close(self) -> None:
        """Remove every hook."""
        self.due = False
        self.drop()
        accelerate_internals.stop(self)
        self._leave()

    @contextmanager
    def context(self) -> Iterator[None]:
        """Around forward and backward: what runs inside can be differentiated twice."""
        if not self.due:
            yield
            return
        self.switches.acquire()
        try:
            yield
        finally:
            self.switches.release()

    # What sees the training ---------------------------------------------------

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The model, or a part of it, is about to run; its inputs if they are to be others."""
        if not (self.due and torch.is_grad_enabled()):
            return None
        self.switches.acquire()
        # Children too: accelerate enters autocast inside the forward pass of the root.
        return None if self.requests[0].autocast else self.precision.enter(module, args, kwargs)

    def after_forward(self, module: nn.Module, *_: Any) -> None:
        """It has run, or failed."""
        self.precision.leave(module)

    def release(self) -> None:
        """The backward pass is done."""
        self.switches.expect(self.due)

    def observe(
        self,
        loss: Tensor | Callable[[], Tensor],
        weight: float = 1.0,
        scale: Tensor | float | None = None,
    ) -> bool:
        """Stage the estimates for ``weight * loss`` if they are due.

        A loss that depends on no parameter of this model is not ours and is
        left alone; the same loss tensor is taken once, and none after a
        function was given.

        Args:
            loss: a scalar with its graph, or a function that returns the
                loss, for products by differences of gradients.
            weight: factor of the loss that is trained.
            scale: loss scale to compute under.

        Returns:
            Whether the loss is this model's.
        """
        requests = self._requests() if self.due else []
        if not requests:
            return False
        self._refuse_sharded(requests)
        if self._stepped_by_another(requests):
            self.enable(False, self.step)
            self.drop()
            return False
        if not isinstance(loss, Tensor):
            self._stage_differences(loss, requests, weight)
            return True
        if self.by_differences or any(known() is loss for known in self.seen):
            return True
        if not loss.requires_grad:
            return False
        with torch.autocast(loss.device.type, enabled=False):
            ours = self._stage_products(loss, requests, weight, scale)
        if not ours:
            ours = depends_on(loss, self.model.parameters())
        if ours:
            self.seen.append(weakref.ref(loss))
        return ours

    def _requests(self) -> list[CurvatureRequest]:
        """Whose turn it is, frozen parameters left out."""
        return [
            request
            for request in self.requests
            if self.step % request.period == request.phase and request.norm.parameter.requires_grad
        ]

    def _stage_products(
        self,
        loss: Tensor,
        requests: Sequence[CurvatureRequest],
        weight: float,
        scale: Tensor | float | None,
    ) -> bool:
        """By the graph of the loss; whether it reaches any of the parameters."""
        parameters = [request.norm.parameter for request in requests]
        try:
            product = GraphProduct(loss, parameters, scale)
            hidden = not all(product.reached) and recomputes(loss)
            if hidden and (any(product.reached) or depends_on(loss, self.model.parameters())):
                raise RuntimeError("reentrant checkpointing hides norms from it")
            if not any(product.reached):
                return False
            self._stage(product, requests, parameters, weight)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(NOT_TWICE.format(error=str(error).splitlines()[0])) from error
        return True

    def _stage_differences(
        self,
        loss_function: Callable[[], Tensor],
        requests: Sequence[CurvatureRequest],
        weight: float,
    ) -> None:
        parameters = [request.norm.parameter for request in requests]
        product = DifferenceProduct(loss_function, self.model, parameters)
        self._stage(product, requests, parameters, weight)
        self.by_differences = True
        self.seen.append(_nothing)

    def _stage(
        self,
        product: GraphProduct | DifferenceProduct,
        requests: Sequence[CurvatureRequest],
        parameters: Sequence[Tensor],
        weight: float,
    ) -> None:
        vectors = self._vectors(requests)
        estimates = diagonal_estimates(product, parameters, requests[0].probe, vectors)
        for request, estimate, reached in zip(requests, estimates, product.reached, strict=True):
            if reached:
                self._add(request.key, estimate * weight)

    def _add(self, key: str, estimate: Tensor) -> None:
        held = self.staged.get(key)
        if held is None:
            self.staged[key] = Statistic(estimate, estimate.new_ones(()))
        else:
            held.sum += estimate

    def _vectors(self, requests: Sequence[CurvatureRequest]) -> list[Tensor]:
        """z of the step, drawn once for all its micro-batches."""
        if not self.vectors:
            parameters = [request.norm.parameter for request in self.requests]
            drawn = probe_vectors(parameters, self.requests[0].probe, self.step)
            self.vectors = {r.key: z for r, z in zip(self.requests, drawn, strict=True)}
        return [self.vectors[request.key] for request in requests]

    def _stepped_by_another(self, requests: Sequence[CurvatureRequest]) -> bool:
        """Whether the parameters changed since the first loss of this step.

        Then another optimizer trains this model, and this one's will not step.
        """
        versions = [request.norm.parameter._version for request in requests]
        changed = bool(self.versions) and versions != self.versions
        self.versions = versions
        return changed

    def _refuse_sharded(self, requests: Sequence[CurvatureRequest]) -> None:
        # Neither module is imported here: without them nothing can be sharded.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        tensors = sys.modules.get("torch.distributed.tensor")
        sharded = fsdp is not None and any(
            isinstance(module, fsdp.FSDPModule) for module in self.model.modules()
        )
        if tensors is not None:
            sharded = sharded or any(
                isinstance(request.norm.parameter, tensors.DTensor) for request in requests
            )
        if sharded:
            raise RuntimeError(SHARDED)
