"""Adam's step in the eigenbases of a gradient's Kronecker second moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_precond.compat import devices
from hf_precond.config.base import OptimizerConfig
from hf_precond.distributed import collectives
from hf_precond.linalg.banded import add_lower_product, banded, banded_size
from hf_precond.linalg.matrix_functions import (
    frobenius_norm,
    gram_newton_schulz,
    half_newton_schulz,
    largest_entry,
    newton_schulz,
)
from hf_precond.linalg.products import (
    Precision,
    arithmetic,
    averaging_weight,
    compute_dtype,
    float32_products,
    matmul,
)
from hf_precond.optimizers.adamr.batch import Batch, Kind, batches, kinds
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.refresh import UNSCHEDULED, BasisRefresh, Count
from hf_precond.optimizers.adamr.tiling import Side, Tiling, tile
from hf_precond.optimizers.base.fallback import AdamWFallback, FallbackOptimizer
from hf_precond.optimizers.base.parameters import ParamView, allocate
from hf_precond.optimizers.base.refresh import FailureRecord

HELD_ELEMENTS = 1 << 25
"""Elements of rotated gradients that may be held from a refresh to the step."""

SIGN_STEPS = 3
"""Newton–Schulz steps of ``direction="sign"``: singular values above 1/60 of U's Frobenius norm
come into [0.6, 1.25], smaller ones stay smaller. Five steps were no better."""


class RotatedAdam:
    """Rotate the gradient, take Adam's step there, rotate back.

    With ``L`` and ``R`` the averages of ``G Gᵀ`` and ``Gᵀ G`` and their
    eigenvectors ``Q_L`` and ``Q_R``::

        Ĝ = Q_Lᵀ G Q_R;   M ← β₁ M + (1-β₁) Ĝ;   V ← β₂ V + (1-β₂) Ĝ∘Ĝ
        Û = M̂ / (max(√V̂, floor · rms √V̂) + ε)
        p ← (1 - lr·wd) p - lr · Q_L Û Q_Rᵀ

    When a basis is refreshed, ``Q' = Q P``, the momentum follows exactly (``Pᵀ M``). The second
    moment follows by the overlap of the coordinates (``(P∘P)ᵀ V``: V stays positive and keeps its
    sum), as always in the first interval, or stays with its columns, raised to where ``M̂² <= V̂``.
    The factors are kept as ``Qᵀ L Q`` and averaged with ``b = min(stat_decay, 1 - 1/k)``. A
    gradient enters them before the bases are refreshed at its step.

    Under ``direction="sign"`` the matrix sign of Û takes its place in hidden layers, at the same
    Frobenius norm: ``Û ← msign(Û) ‖Û‖_F / ‖msign(Û)‖_F``. It does not depend on the bases:
    ``Q_L msign(Û) Q_Rᵀ = msign(Q_L Û Q_Rᵀ)``.

    A step is :meth:`refresh` and then :meth:`step`. The first call only collects statistics: in the
    basis of its own gradient an entry off the diagonal is pure rounding, and Adam would scale it
    to 1.

    Source: Ying Sun, "Designing effective preconditioned optimizers for deep
    neural network training", PolyU 2024 (the rotation transformation); the
    step is our reconstruction, related to SOAP (Vyas et al., 2024). The sign of
    SOAP's step is known from SOAP-Muon (modded-nanogpt, 2026).

    Args:
        config: AdamR's fields.
        failures: the optimizer's record.
        count: the optimizer's counter.
    """

    def __init__(self, config: AdamRConfig, failures: FailureRecord, count: Count) -> None:
        self.config = config
        self.failures = failures
        self.count = count
        self.bases = BasisRefresh(config, failures, count)
        # Of the step that has begun: what takes it, and which gradients were finite.
        self.batches: list[Batch] = []
        self.usable: list[Tensor] = []

    # State --------------------------------------------------------------------------

    def tiling(self, view: ParamView) -> Tiling:
        """How a view is rotated."""
        return tile(view.shape, self.config, view.matrix)

    def allocate(self, view: ParamView) -> None:
        """Make the state of a rotated view, or convert it as its parameter was.

        Per tile: ``exp_avg`` (M), ``exp_avg_sq`` (V) and ``mean_sq`` (the mean of V, which no
        rotation changes); of each rotated side ``left_factor`` (``Q_Lᵀ L Q_L``, its lower triangle
        as :func:`~hf_precond.linalg.banded.banded`) and ``left_basis`` (``Q_L``). Plain numbers:
        ``step`` counts Adam's steps, ``left_updates`` the statistics in a factor; ``observed`` is 1
        once these come from the layer's features. ``left_energy`` is on the host.

        Args:
            view: the view.

        Raises:
            RuntimeError: the parameter has another shape than its state.
        """
        tiling, param = self.tiling(view), view.param
        dtype, device = compute_dtype(param.dtype), param.device
        shape = (tiling.tiles, tiling.rows, tiling.columns)
        if "exp_avg" in view and "mean_sq" not in view:  # AdamW's, which stepped it until now
            for name in ("exp_avg", "exp_avg_sq", "step"):
                view.state.pop(view.prefix + name, None)
        new = "exp_avg" not in view
        if not new:
            held = view["exp_avg"]
            if (held.shape, held.dtype, held.device) == (shape, dtype, device):
                return
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("exp_avg", "exp_avg_sq"), shape)
        shapes["mean_sq"] = tiling.tiles, 1, 1
        for side in tiling.sides:
            size = tiling.rows if side == "left" else tiling.columns
            shapes[f"{side}_factor"] = tiling.tiles, banded_size(size)
            shapes[f"{side}_basis"] = tiling.tiles, size, size
            allocate(view.state, f"{view.prefix}{side}_energy", (), dtype, torch.device("cpu"))
        for name, wanted in shapes.items():
            kept = self.config.factor_dtype(param.dtype) if name.endswith("factor") else dtype
            allocate(view.state, view.prefix + name, wanted, kept, device)
        if new:
            view["step"] = view["observed"] = 0
            for side in tiling.sides:
                view[f"{side}_updates"] = view[f"{side}_refreshed"] = 0
                view[f"{side}_phase"] = UNSCHEDULED
                view[f"{side}_energy"].fill_(math.inf)

    def observe(self, view: ParamView, means: Mapping[Side, Tensor]) -> Tensor:
        """Average second moments of a layer's features into the factors, instead of the gradient's.

        ``B ← b B + (1-b) Qᵀ S Q``; an S that is not finite changes nothing.

        Args:
            view: the view, allocated.
            means: S of each rotated side, ``[n, n]``.

        Returns:
            How many were not finite: a 0-d tensor.
        """
        view["observed"] = 1
        dropped = []
        for side, mean in means.items():
            factor = view[f"{side}_factor"]
            mean = mean.to(view["exp_avg"].dtype)[None]
            usable = torch.isfinite(mean).all()
            dropped.append(~usable)
            if view["step"] > 0:
                basis = view[f"{side}_basis"]
                mean = basis.mT @ mean @ basis
            view[f"{side}_updates"] += 1
            weight = 1 - averaging_weight(view[f"{side}_updates"], self.config.stat_decay)
            wide, mean = factor.to(mean.dtype), banded(mean)
            factor.copy_(torch.lerp(wide, torch.where(usable, mean, wide), weight))
        return torch.stack(dropped).sum()

    # The step -------------------------------------------------------------------------

    def kinds(self, views: Sequence[ParamView]) -> list[Kind]:
        """What :meth:`refresh` takes.

        Args:
            views: all rotated views that take a step.
        """
        return kinds([(view, self.tiling(view)) for view in views])

    def refresh(self, found: Sequence[Kind]) -> None:
        """Begin a step: refresh the bases that are due, with the gradients in their factors.

        Args:
            found: the :meth:`kinds` of all rotated views that take this step, allocated.
        """
        self.batches = list(batches(found))
        self.usable = []
        due = self.bases.due(self.batches)
        room = HELD_ELEMENTS
        for batch in dict.fromkeys(item.batch for item in due):
            self._collect(batch)
            room -= batch.elements
            # Only the rank that refreshes a basis could let the gradient follow.
            if room < 0 or batch.number("step") == 0 or collectives.world_size() > 1:
                batch.rotated_gradient = None
        self.bases.refresh([item for item in due if not is_first_call(item.batch)])

    def step(self) -> None:
        """Take the step that has begun, in the bases as they are now."""
        for batch in self.batches:
            if not batch.collected:
                self._collect(batch)
            if not is_first_call(batch):
                batch.add("step")
                held, batch.rotated_gradient = batch.rotated_gradient, None
                direction, scale = self._adam(batch, self._rotate(batch) if held is None else held)
                del held
                if self.config.direction == "sign" and batch.views[0].hidden:
                    direction = sign_at_norm(direction, self.config.precision)
                self._descend(batch, direction, scale)
            batch.release()
        self.batches = []
        if self.usable:
            device = self.usable[0].device
            usable = torch.cat([flags.flatten().to(device) for flags in self.usable])
            dropped = usable.all().logical_not()
            self.count("gradients_dropped", dropped.to(torch.int64))
            self.failures.watch("gradient", ["adamr"], dropped[None])

    def _rotate(self, batch: Batch) -> Tensor:
        """``Q_Lᵀ G Q_R`` (its rows that are not zero); G itself before there is a basis."""
        matrix, precision = batch.gradient(), self.config.precision
        batch.rows = batch.rows_read(matrix)
        if batch.rows is not None:
            matrix = matrix.index_select(1, batch.rows)
        if batch.number("step") > 0:
            if batch.tiling.left:
                matrix = matmul(batch["left_basis"].mT, matrix, precision)
            if batch.tiling.right:
                matrix = matmul(matrix, batch["right_basis"], precision)
        return matrix

    def _collect(self, batch: Batch) -> None:
        """Rotate the gradient, and average it into the factors: ``B ← b B + (1-b) Ĝ Ĝᵀ``.

        A gradient that is not finite, or too large to square, changes no factor.
        """
        batch.rotated_gradient = rotated = self._rotate(batch)
        batch.norms = torch.linalg.vector_norm(rotated, dim=(-2, -1), keepdim=True).square_()
        batch.collected = True
        sides = self._sides_to_update(batch)
        if not sides:
            return
        usable = batch.norms < math.inf
        self.usable.append(usable)
        all_usable = usable.is_cpu and bool(usable.all())  # a GPU is not asked
        for side in sides:
            batch.add(f"{side}_updates")
            decay = averaging_weight(batch.number(f"{side}_updates"), self.config.stat_decay)
            factor, root = batch[f"{side}_factor"], rotated if side == "left" else rotated.mT
            average = factor.to(rotated.dtype, copy=not all_usable)
            with float32_products(self.config.precision, rotated):
                add_lower_product(average, root, root.mT, beta=decay, alpha=1 - decay)
            if not all_usable and average.dtype == factor.dtype:
                torch.where(usable[..., 0], average, factor, out=factor)
            elif average is not factor:
                factor.copy_(torch.where(usable[..., 0], average, factor))

    def _sides_to_update(self, batch: Batch) -> Sequence[Side]:
        """The sides whose factor takes in this gradient.

        Both at the first two calls, then each every ``stat_interval`` steps, left and right half an
        interval apart so that steps cost the same.
        """
        sides, step, interval = batch.tiling.sides, batch.number("step"), self.config.stat_interval
        if batch.number("observed"):
            return ()
        if batch.number(f"{sides[0]}_updates") < 2:
            return sides
        delays = {"left": 0, "right": interval // 2}
        return [side for side in sides if (step + delays[side]) % interval == 0]

    def _adam(self, batch: Batch, rotated: Tensor) -> tuple[Tensor, float]:
        """Adam's direction, and what it is to be multiplied with.

        ``M / (max(√V, floor · rms √V) + ε c₂)`` with ``c₂ = √(1-β₂ᵗ)``, to be multiplied with the
        bias corrections ``c₂ / (1-β₁ᵗ)``. The mean of V follows from ``‖Ĝ‖ = ‖G‖``.
        """
        (beta1, beta2), step, tiling = batch.group["betas"], batch.number("step"), batch.tiling
        first, second, mean = batch["exp_avg"], batch["exp_avg_sq"], batch["mean_sq"]
        assert batch.norms is not None
        mean.mul_(beta2).add_(batch.norms, alpha=(1 - beta2) / (tiling.rows * tiling.columns))
        if not rotated.is_cpu:
            return fused_direction(batch, rotated, mean * self.config.floor**2), 1.0
        if batch.rows is None:
            first.lerp_(rotated, 1 - beta1)
            second.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        else:
            first.mul_(beta1).index_add_(1, batch.rows, rotated, alpha=1 - beta1)
            second.mul_(beta2).index_add_(1, batch.rows, rotated.square(), alpha=1 - beta2)
        correction = math.sqrt(1 - beta2**step)
        direction = second.sqrt().clamp_min_(mean.sqrt().mul_(self.config.floor))
        direction.add_(batch.group["eps"] * correction)
        torch.div(first, direction, out=direction)
        return direction, correction / (1 - beta1**step)

    def _descend(self, batch: Batch, direction: Tensor, scale: float) -> None:
        """``p ← (1 - lr·wd) p - lr · scale · Q_L u Q_Rᵀ``; the scale goes into the last product."""
        precision, lr = self.config.precision, batch.group["lr"]
        if not batch.tiling.right:
            left, right = batch["left_basis"], direction
        else:
            left, right = direction, batch["right_basis"].mT
            if batch.tiling.left:
                left = matmul(batch["left_basis"], direction, precision)
        target = batch.target()
        if target is not None and arithmetic(precision, target) != "bf16":
            keep = 1 - lr * batch.group["weight_decay"]
            with float32_products(precision, target):
                target.baddbmm_(left, right, beta=keep, alpha=-lr * scale)
        else:
            step = matmul(left, right, precision)
            batch.descend(step if scale == 1.0 else step.mul_(scale))


def sign_at_norm(matrices: Tensor, precision: Precision) -> Tensor:
    """``msign(U) ‖U‖_F / ‖msign(U)‖_F`` of every matrix, by :data:`SIGN_STEPS` Newton–Schulz steps.

    Args:
        matrices: U, ``[b, m, n]``.
        precision: a config's; ``auto`` is half precision on accelerators.

    Returns:
        ``[b, m, n]``; zeros stay zeros.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    if arithmetic(precision, wide, "sign") == "half":
        sign = half_newton_schulz(wide, steps=SIGN_STEPS)
    elif wide.shape[2] < 2 * wide.shape[1]:
        with float32_products(precision, wide):
            sign = newton_schulz(wide, SIGN_STEPS)
    else:
        unit = wide / largest_entry(wide)
        with float32_products("highest", unit):
            gram = torch.bmm(unit, unit.mT)
            sign = torch.bmm(gram_newton_schulz(gram, SIGN_STEPS), unit)
    sign = sign.mT if tall else sign
    return sign.mul_(frobenius_norm(matrices) / frobenius_norm(sign))


def fused_direction(batch: Batch, rotated: Tensor, lowest: Tensor) -> Tensor:
    """Update the moments and return ``M̂ / (max(√V̂, lowest) + ε)``, by torch's fused Adam.

    A step of length -1 from zero, with the floor in the place of AMSGrad's largest second moment.

    Args:
        batch: the matrices; their ``step`` counts this step.
        rotated: Ĝ, ``[b, rows, columns]``.
        lowest: least V of each tile, ``[b, 1, 1]``, before the correction of its bias.

    Returns:
        ``[b, rows, columns]``.
    """
    direction, (beta1, beta2) = torch.zeros_like(rotated), batch.group["betas"]
    fused = devices.is_fused(rotated.device)
    adamw(
        [direction],
        [rotated],
        [batch["exp_avg"]],
        [batch["exp_avg_sq"]],
        [lowest.expand_as(rotated).contiguous()],
        [torch.full((), batch.number("step") - 1.0, dtype=torch.float32, device=rotated.device)],
        fused=fused,
        foreach=not fused,
        capturable=devices.is_capturable(rotated.device),
        amsgrad=True,
        beta1=beta1,
        beta2=beta2,
        lr=-1.0,
        weight_decay=0.0,
        eps=batch.group["eps"],
        maximize=False,
    )
    return direction


def is_first_call(batch: Batch) -> bool:
    """Whether these views have had no statistics before this step, which is then none for them."""
    return batch.number("step") == 0 and batch.number(f"{batch.tiling.sides[0]}_updates") < 2


class RotatedAdamFallback(FallbackOptimizer):
    """:class:`RotatedAdam` as another optimizer's fallback; AdamW where there is nothing to rotate.

    Args:
        config: AdamR's fields.
        failures: the optimizer's record.
        count: the optimizer's counter.
    """

    def __init__(self, config: AdamRConfig, failures: FailureRecord, count: Count) -> None:
        self.adamw = AdamWFallback()
        self.rotated = RotatedAdam(config, failures, count)

    @classmethod
    def under(
        cls, config: OptimizerConfig, failures: FailureRecord, count: Count
    ) -> RotatedAdamFallback:
        """With AdamR's defaults, and what the optimizer's own config shares.

        Fields of the same name as another optimizer's factors (``stat_decay``,
        ``max_dim``, …) mean that optimizer's own and are not taken over.

        Args:
            config: the optimizer's.
            failures: the optimizer's record.
            count: the optimizer's counter.
        """
        shared = {
            name: getattr(config, name)
            for name in ("state_dtype", "precision")
            if hasattr(config, name)
        }
        return cls(AdamRConfig.create(**shared), failures, count)

    def allocate(self, views: Sequence[ParamView]) -> None:
        """Make the state of each view, where it is missing."""
        plain, rotated = self._divided(views)
        self.adamw.allocate(plain)
        for view in rotated:
            self.rotated.allocate(view)

    def update(self, views: Sequence[ParamView]) -> None:
        """Step every view by its gradient."""
        self.allocate(views)
        plain, rotated = self._divided(views)
        if plain:
            self.adamw.update(plain)
        self.rotated.refresh(self.rotated.kinds(rotated))
        self.rotated.step()

    def _divided(self, views: Sequence[ParamView]) -> tuple[list[ParamView], list[ParamView]]:
        """The views that AdamW steps, and those that are rotated."""
        rotated = [view for view in views if self.rotated.tiling(view).sides]
        return [view for view in views if not self.rotated.tiling(view).sides], rotated
