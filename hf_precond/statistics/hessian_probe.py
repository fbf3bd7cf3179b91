"""Curvature of the norm parameters by Hessian-vector products of the training loss.

torch's fused attention kernels have no second derivative, compiled graphs and
reentrant checkpointing none either; so the passes that are probed run without.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_precond.architectures.tables import CHECKPOINTING
from hf_precond.compat import accelerate_internals, devices
from hf_precond.compat.torch_internals import EagerCode, Hook, in_float32
from hf_precond.compat.warn import warn
from hf_precond.linalg.products import autocast_dtype
from hf_precond.statistics.hessian_products import (
    GraphProduct,
    depends_on,
    diagonal_estimates,
    made_of,
    probe_vectors,
    recomputes,
)
from hf_precond.statistics.requests import CurvatureRequest, CurvatureSource, Statistic

if TYPE_CHECKING:
    from hf_precond.statistics.finite_differences import DifferenceProduct
    from hf_precond.statistics.recorded_losses import RecordedLoss

NO_LOSS = (
    "sgdph: step {step} is due for a Hessian-vector product, and no loss of this model was seen "
    "since the last step. In a plain loop run forward and backward inside "
    "`with optimizer.curvature_context():` and call optimizer.probe(loss) before loss.backward(); "
    "zero_grad() must not come between probe and step. With Accelerate call "
    "accelerator.backward(loss). Where that loss reaches the model by hooks alone (GradCache), "
    "call optimizer.probe(lambda: loss_function(model(x), y)) before the backward pass, or choose "
    "adamr or afopt."
)
NOT_TWICE = (
    "sgdph: the training graph cannot be differentiated twice ({error}). Fused attention: load the "
    "model with attn_implementation='sdpa' or 'eager', and run the forward pass inside "
    "optimizer.curvature_context(). Reentrant checkpointing: pass use_reentrant=False. Compiled or "
    "fused kernels: switch them off. A loss that has no second derivative: give optimizer.probe a "
    "function that returns the loss, optimizer.probe(lambda: loss_function(model(x), y)), before "
    "the backward pass; a Trainer does so by itself where all of the loss comes from its "
    "compute_loss. Otherwise choose adamr or afopt."
)
SWITCHED = (
    "sgdph: the loss of {name} cannot be differentiated twice ({error}); on the steps that are "
    "probed its compute_loss is run again, and curvature is taken from differences of gradients."
)
HIDDEN = "no graph was seen to lead from the loss to the norms"
NOT_AGAIN = (
    "sgdph: {name}.compute_loss returned {first:.8g} and then {second:.8g} for one batch and the "
    "same random numbers, and its loss cannot be differentiated twice ({error}), so there is no "
    "curvature to be had: something in it is random beyond the generators of Python, numpy and "
    "torch. Choose adamr or afopt."
)
SHARDED = (
    "sgdph: the model is sharded (FSDP2, or parameters that are DTensors), and its backward pass "
    "cannot be differentiated; train with DDP (torchrun), or choose afopt, adamr, muon or nkfac."
)


class DoubleBackward:
    """The switches that one model's Hessian-vector products need.

    :meth:`expect` is for the moment before the passes of a step; :meth:`acquire`
    for a forward pass; :meth:`release`, when its backward pass is done, takes
    both back. Each may be called repeatedly.

    Args:
        model: its modules' reentrant checkpointing (transformers') is run
            non-reentrant meanwhile.
    """

    holders = 0
    attention = ExitStack()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.code = EagerCode()
        self.held = False
        self.checkpoints: list[tuple[nn.Module, Any]] = []

    def expect(self, due: bool) -> None:
        """Undoes everything, and has compiled code run uncompiled if the next step is due.

        Args:
            due: whether the next step's passes are differentiated twice.
        """
        self.release()
        self.code.expect(due)

    def acquire(self) -> None:
        """Switches compiled code, attention (to the MATH kernel) and checkpointing."""
        self.code.acquire()
        if self.held:
            return
        self.held = True
        if DoubleBackward.holders == 0:
            DoubleBackward.attention.enter_context(sdpa_kernel(SDPBackend.MATH))
        DoubleBackward.holders += 1
        for module in self.model.modules():
            function = module.__dict__.get(CHECKPOINTING)
            if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
                keywords = function.keywords | {"use_reentrant": False}
                self.checkpoints.append((module, function))
                twice = functools.partial(function.func, *function.args, **keywords)
                setattr(module, CHECKPOINTING, twice)

    def release(self) -> None:
        """Undoes everything."""
        self.code.release()
        while self.checkpoints:
            module, function = self.checkpoints.pop()
            setattr(module, CHECKPOINTING, function)
        if self.held:
            self.held = False
            DoubleBackward.holders -= 1
            if DoubleBackward.holders == 0:
                DoubleBackward.attention.close()


class FullPrecision:
    """Runs modules in the precision of their weights, float32 or float64, inside autocast.

    A model with any weight of another dtype is left under autocast, which
    may be what makes its dtypes fit together.

    Args:
        model: the model the modules belong to.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.left: list[tuple[nn.Module, torch.autocast]] = []
        self._full: bool | None = None

    def expect(self) -> None:
        """Reads the weights' dtypes again at the next :meth:`enter`; they hold for a step."""
        self._full = None

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Leaves autocast before a module's forward pass.

        Args:
            module: the module.
            args: its positional inputs.
            kwargs: its other inputs.

        Returns:
            The inputs with what autocast made in lower precision, outside of
            the module, cast to float32; ``None`` to leave them as they are.
        """
        device = next(self.model.parameters()).device.type
        if not torch.is_autocast_enabled(device) or not self._is_full():
            return None
        low = torch.get_autocast_dtype(device)
        context = torch.autocast(device, enabled=False)
        context.__enter__()
        self.left.append((module, context))
        return in_float32((args, kwargs), low)

    def leave(self, module: nn.Module) -> None:
        """Enters autocast again after a module's forward pass, also one that failed.

        Args:
            module: the module.
        """
        if self.left and self.left[-1][0] is module:
            self.left.pop()[1].__exit__(None, None, None)

    def _is_full(self) -> bool:
        """Whether every weight is float32 or float64."""
        if self._full is None:
            allowed = (torch.float32, torch.float64)
            self._full = all(weight.dtype in allowed for weight in self.model.parameters())
        return self._full


class CurvatureProbe(CurvatureSource):
    """Estimates the Hessian diagonal of norm parameters on the steps that are due.

    It sees the loss through ``Accelerator.backward`` or :meth:`observe`. On
    the steps that are due, the model's forward pass switches attention to a
    kernel that can be differentiated twice, until the backward pass is done,
    and runs outside autocast unless the requests allow it.

    Under a Trainer :meth:`record` sees the calls of ``compute_loss`` too. Once
    a graph could not be differentiated twice, these are made again when the
    gradients are complete, and the products are differences of gradients.

    Args:
        model: the root of what is trained, inside any wrapper.
        requests: what to probe; one estimator for all.
    """

    def __init__(self, model: nn.Module, requests: Sequence[CurvatureRequest]) -> None:
        self.model = model
        self.requests = list(requests)
        self.due = False
        self.step = 0
        self.vectors: dict[str, Tensor] = {}
        self.reason = ""  # why the graph of the loss that is trained was of no use
        self.once = False  # that loss has one derivative alone
        self.again = False  # the calls that made it are being made again
        self.recorded: list[RecordedLoss] = []
        self.drop()
        self.switches = DoubleBackward(model)
        self.precision = FullPrecision(model)
        leave = ExitStack()
        leave.callback(accelerate_internals.listen(self))
        leave.callback(self.switches.release)
        # Children too: some trainers call a part of the model and never its root.
        for module in (model, *model.children()):
            before, after = Hook(self._before_forward), Hook(self._after_forward)
            leave.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            leave.callback(module.register_forward_hook(after, always_call=True).remove)
        self._leave = weakref.finalize(self, leave.close)
        self._leave.atexit = False

    # What the optimizer calls -------------------------------------------------

    def enable(self, due: bool, step: int) -> None:
        """Probes (or not) in the passes before the optimizer's step number ``step``.

        Args:
            due: whether to probe what is requested for this step.
            step: the number of the step.
        """
        self.due = due and any(step % r.period == r.phase for r in self.requests)
        self.step = step
        self.vectors = {}
        self.precision.expect()
        self.switches.expect(self.due)

    def take(self) -> dict[str, Statistic]:
        """Returns the estimates since the last call, by request key, and forgets them.

        Raises:
            RuntimeError: products were due and no loss of this model was observed.
        """
        self.switches.release()
        recorded = [call for call in self.recorded if call.factor is not None]
        if self.due and recorded and not self.by_differences:
            self._make_again(recorded)
        observed = self.losses or self.by_differences
        if self.due and not observed and self._requests():
            raise RuntimeError(NO_LOSS.format(step=self.step))
        estimates = self.estimates
        self.drop()
        return estimates

    def drop(self) -> None:
        """Forgets the estimates (a skipped step)."""
        self.estimates: dict[str, Statistic] = {}
        self.losses: list[weakref.ref[Tensor]] = []
        self.by_differences = False
        self.versions: list[int] = []
        self._forget_calls()

    def close(self) -> None:
        """Removes every hook."""
        self.due = False
        self.drop()
        self._leave()

    @contextmanager
    def context(self) -> Iterator[None]:
        """Returns a context inside which forward and backward can be differentiated twice."""
        if not self.due:
            yield
            return
        self.switches.acquire()
        try:
            yield
        finally:
            self.switches.release()

    # What watches the training ---------------------------------------------------

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (self.due and torch.is_grad_enabled()):
            return None
        # Also where no graph will be used: a resumed run, which cannot know yet, goes this way too.
        if not self.again:
            self.switches.acquire()
        # Children too: accelerate enters autocast inside the forward pass of the root.
        return None if self._stays() else self.precision.enter(module, args, kwargs)

    def _stays(self) -> bool:
        """Whether the passes stay under the autocast that is in force."""
        asked, weight = self.requests[0].autocast, next(self.model.parameters())
        if asked is None:
            low = autocast_dtype(weight.device)
            return devices.is_accelerator(weight) and low == torch.bfloat16
        return asked

    def _after_forward(self, module: nn.Module, *_: Any) -> None:
        self.precision.leave(module)

    def release(self) -> None:
        """Undoes the switches: the backward pass is done."""
        self.switches.expect(self.due)

    def record(
        self,
        owner: Any,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Makes a call of a Trainer's ``compute_loss`` and, where due, keeps how to make it again.

        Args:
            owner: the Trainer.
            function: its bound method.
            args: of the call.
            kwargs: of the call.

        Returns:
            What the call returned; the loss is a copy that is watched.
        """
        requests = self._requests() if self.due else []
        if not requests or self._rests(requests):
            return function(*args, **kwargs)
        from hf_precond.statistics.recorded_losses import RecordedLoss

        call = RecordedLoss(owner, function, args, kwargs, self.model)
        returned = call.watched(function(*args, **kwargs))
        if call.node is not None:
            self.recorded.append(call)
        return returned

    def observe(
        self,
        loss: Tensor | Callable[[], Tensor],
        weight: float = 1.0,
        scale: Tensor | float | None = None,
    ) -> bool:
        """Adds the estimates for ``weight * loss`` if they are due.

        A loss that depends on no parameter of this model is ignored; the same
        loss tensor counts once, and none counts after a function was given.

        Args:
            loss: a scalar with its graph, or a function that returns the
                loss, for products by differences of gradients.
            weight: what the training multiplies the loss by.
            scale: loss scale to compute under.

        Returns:
            Whether the loss is this model's.
        """
        requests = self._requests() if self.due and not self.again else []
        if not requests:
            return False
        self._refuse_sharded(requests)
        if self._rests(requests):
            return False
        if not isinstance(loss, Tensor):
            function = loss
            product = self._differences(lambda: function().backward(), [self.model], requests)
            self._add(product, requests, weight)
            self.by_differences = True
            self._forget_calls()
            return True
        if self.by_differences or any(known() is loss for known in self.losses):
            return True
        if not loss.requires_grad:
            return False
        if self.once and self._comes_again(loss, requests):
            return True
        heard = [(call, call.node, call.factor) for call in self.recorded]
        try:
            with torch.autocast(loss.device.type, enabled=False):
                ours = self._add_products(loss, requests, weight, scale)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a function says that is not made for a second one
            self.reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            for call, node, factor in heard:  # the products' own pass is not the training's
                call.node, call.factor = node, factor
            if self._comes_again(loss, requests):
                return True
            raise RuntimeError(NOT_TWICE.format(error=self.reason)) from error
        if ours:
            self._forget_calls()
        else:
            ours = depends_on(loss, self.model.parameters())
        if ours:
            self.losses.append(weakref.ref(loss))
        return ours

    # Losses with one derivative alone -----------------------------------------------

    def _forget_calls(self) -> None:
        for call in self.recorded:
            call.node = None  # which holds the call by its hook
        self.recorded = []

    def _comes_again(self, loss: Tensor, requests: Sequence[CurvatureRequest]) -> bool:
        """Whether recorded calls made a loss, so that :meth:`take` will serve it."""
        made = [call.node for call in self.recorded]
        return made_of(loss, made, [request.norm.parameter for request in requests])

    def _make_again(self, calls: Sequence[RecordedLoss]) -> None:
        """Adds the differences of gradients of recorded calls, whose backward passes are done."""
        from hf_precond.statistics.recorded_losses import modules_of

        owner, requests = calls[0].owner, self._requests()
        modules = [self.model, *modules_of(owner)]
        precise = not requests[0].autocast and self.precision._is_full()
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale

        def run() -> None:
            for call in calls:
                assert call.factor is not None
                (call.loss(precise) * call.factor).backward()

        with accelerate_internals.outside_autocast(modules) if precise else nullcontext():
            self.again = True
            try:
                low = None if precise else calls[0].autocast
                product = self._differences(run, modules, requests, owner, low)
                if not self.once:
                    self._refuse_unrepeatable(product, calls[0], precise)
                self._add(product, requests, 1.0 if scale is None else 1.0 / scale)
            finally:
                self.again = False
        self.by_differences = True

    def _refuse_unrepeatable(
        self, product: DifferenceProduct, call: RecordedLoss, precise: bool
    ) -> None:
        """Says once that differences are taken, of a loss that is the same when made again."""
        name, reason = type(call.owner).__name__, self.reason or HIDDEN
        values = []
        for _ in range(2):
            with product.undisturbed(), torch.enable_grad():
                values.append(float(call.loss(precise).detach()))
        first, second = values
        bound = product.epsilon ** (2 / 3) * max(abs(first), abs(second), 1.0)
        if abs(first - second) > bound:
            error = NOT_AGAIN.format(name=name, first=first, second=second, error=reason)
            raise RuntimeError(error)
        self.once = True
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            warn(SWITCHED.format(error=reason, name=name))

    def _differences(
        self,
        run: Callable[[], None],
        modules: Sequence[nn.Module],
        requests: Sequence[CurvatureRequest],
        owner: Any = None,
        autocast: torch.dtype | None = None,
    ) -> DifferenceProduct:
        from hf_precond.statistics import finite_differences

        epsilon = finite_differences.machine_epsilon(modules, autocast)
        parameters = [request.norm.parameter for request in requests]
        return finite_differences.DifferenceProduct(run, modules, parameters, epsilon, owner)

    def _requests(self) -> list[CurvatureRequest]:
        """The requests that are due, without those for frozen parameters."""
        return [
            request
            for request in self.requests
            if self.step % request.period == request.phase and request.norm.parameter.requires_grad
        ]

    def _add_products(
        self,
        loss: Tensor,
        requests: Sequence[CurvatureRequest],
        weight: float,
        scale: Tensor | float | None,
    ) -> bool:
        """Adds products by the loss's graph; returns whether it reaches any of the parameters."""
        parameters = [request.norm.parameter for request in requests]
        product = GraphProduct(loss, parameters, scale)
        hidden = not all(product.reached) and recomputes(loss)
        if hidden and (any(product.reached) or depends_on(loss, self.model.parameters())):
            raise RuntimeError("reentrant checkpointing hides norms from it")
        if not any(product.reached):
            return False
        self._add(product, requests, weight)
        return True

    def _add(
        self,
        product: GraphProduct | DifferenceProduct,
        requests: Sequence[CurvatureRequest],
        weight: float | Tensor,
    ) -> None:
        vectors = self._vectors(requests)
        estimates = diagonal_estimates(product, requests[0].probe, vectors)
        if isinstance(weight, Tensor):  # perhaps of another device
            terms = [estimate * weight for estimate in estimates]
        else:
            terms = list(torch._foreach_mul(estimates, weight))
        counts = terms[0].new_ones(len(terms)).unbind()
        pairs = zip(terms, counts, strict=True)
        for request, pair, reached in zip(requests, pairs, product.reached, strict=True):
            if reached and request.key in self.estimates:
                self.estimates[request.key].sum += pair[0]
            elif reached:
                self.estimates[request.key] = Statistic(*pair)

    def _vectors(self, requests: Sequence[CurvatureRequest]) -> list[Tensor]:
        """The vectors of the step, drawn once for all its micro-batches."""
        if not self.vectors:
            parameters = [request.norm.parameter for request in self.requests]
            drawn = probe_vectors(parameters, self.requests[0].probe, self.step)
            self.vectors = {r.key: z for r, z in zip(self.requests, drawn, strict=True)}
        return [self.vectors[request.key] for request in requests]

    def _rests(self, requests: Sequence[CurvatureRequest]) -> bool:
        """Stops if the parameters changed since the first loss of this step, and says whether.

        Then another optimizer trains this model, and this one's will not step.
        """
        versions = [request.norm.parameter._version for request in requests]
        changed = bool(self.versions) and versions != self.versions
        self.versions = versions
        if changed:
            self.enable(False, self.step)
            self.drop()
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
