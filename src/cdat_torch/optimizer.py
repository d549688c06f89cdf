"""Any ``torch.optim`` optimizer with a tuned learning rate.

`TunedOptimizer.step` reads from top to bottom. The closure or `backward` gives the loss and its
gradient, the base optimizer proposes the direction u, `cdat_torch.step` measures along it and asks
the tuner for the rate, and the parameters move by rate times multiplier times u.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_core.extend import StepInfo, validation
from cdat_core.linesearch import LineSearch
from cdat_core.tuners import Tuner
from cdat_torch.base import groups
from cdat_torch.base.base_step import BaseStep
from cdat_torch.distributed.fsdp import refuse_gauss_newton, reshard
from cdat_torch.distributed.replicas import Replicas
from cdat_torch.interrupts import defer_interrupts
from cdat_torch.side_effects import SideEffects, restore_on_error
from cdat_torch.spaces import scalar_dtype
from cdat_torch.step import checkpoint
from cdat_torch.step.average import WeightAverage
from cdat_torch.step.closure import closure_loss
from cdat_torch.step.evaluation import ClosureLoss, PlainGradient, StepLoss
from cdat_torch.step.info import Decision, SkipCount, all_finite
from cdat_torch.step.micro_batches import MicroBatches
from cdat_torch.step.rate import rate_rule
from cdat_torch.step.sharpness import SharpnessTracker


class TunedOptimizer(Optimizer):
    """A ``torch.optim`` optimizer whose learning rate a tuner or a line search chooses.

    ``step`` takes a closure that returns the loss *without* calling backward::

        loss = optimizer.step(lambda: F.cross_entropy(model(x), y))

    On wrapping, ``group["lr"]`` becomes a multiplier: the group's learning rate divided by the
    default of the base, so 1.0 unless groups differ. The tuned rate, before the multiplier, is
    ``group["tuned_lr"]``. Attach learning-rate schedulers to the wrapper: they change the
    multiplier. A tuner measures with the multipliers at wrapping, and later changes scale the step;
    a line search tries the scaled step itself.

    If loss, gradient or curvature is not finite the step is skipped: parameters, the state of the
    base and the averages of the tuner stay as they are, and ``last.skipped`` goes up by one. For
    that each step waits for the device.

    Trainers, clipping and accumulation need no closure: call `backward` instead of
    ``loss.backward()``, then ``step()``.

    With several processes (``torch.distributed``) each evaluates the loss of its part of the batch,
    and the optimizer averages gradients, loss, slope and curvature; all take the same step, bit for
    bit. The model may use DistributedDataParallel (its own all-reduce is skipped), ``fully_shard``
    or tensor parallelism. If the parts are unequal, weigh their losses so that the mean is the loss
    of the whole batch.

    Parameters
    ----------
    base : torch.optim.Optimizer
        The optimizer that gives the direction. It must not have a scheduler yet.
    tuner_or_search : cdat_core.tuners.Tuner or cdat_core.linesearch.LineSearch
        It chooses the rate. A line search evaluates the closure again for each trial, with the same
        random numbers and without changing buffers such as BatchNorm's running statistics, and
        computes a gradient only if the search asks for the slope of a trial.
    curvature : str
        How the curvature is computed; see `cdat_torch.measure`.
    every : int, optional
        Measure curvature and sharpness once in `every` steps. By default the tuner decides when it
        wants a measurement; most tuners want one in each step. A measurement that was skipped is
        repeated in the next step. In between, the last positive rate is held, or changes with the
        loss if the tuner observes that.
    sharpness_matvecs : int
        Hessian-vector products for the sharpness, if the tuner needs it, in each step that
        measures; the first measurement takes at least 20, because it starts from a random vector.
        Each costs two to three gradients and keeps one vector like the parameters in memory.
    inverse_sqrt : callable, optional
        ``v -> P^-1/2 v`` on lists of tensors like the parameters that require grad; the sharpness
        is the largest eigenvalue of ``P^-1/2 H P^-1/2``. It is called after the base has updated
        its state. By default P is ``sqrt(v_hat) + eps`` for Adam and AdamW, else the identity.
    average : bool
        Keep a running average of the weights, for evaluation; see `averaged`. It takes as much
        memory as the parameters, in float32 at least.
    max_consecutive_skips : int, optional
        Raise a RuntimeError after this many consecutive skipped steps. Each step then waits for the
        device once more. By default there is no limit.
    process_group : torch.distributed.ProcessGroup or False, optional
        The processes that train replicas of the model; by default all, if ``torch.distributed`` is
        initialised. False means this process alone.

    Attributes
    ----------
    base : torch.optim.Optimizer
        The wrapped optimizer.
    last : cdat_core.extend.StepInfo or None
        The last measurement; None at first.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind described.

    Examples
    --------
    >>> import torch
    >>> from cdat_core import tuners
    >>> from cdat_torch import TunedOptimizer
    >>> w = torch.zeros(2, requires_grad=True)
    >>> optimizer = TunedOptimizer(torch.optim.SGD([w]), tuners.cdat(sigma=1.0))
    >>> loss = optimizer.step(lambda: ((w - 3.0) ** 2).sum())
    >>> w.tolist()
    [3.0, 3.0]
    """

    def __init__(
        self,
        base: Optimizer,
        tuner_or_search: Tuner[Any] | LineSearch,
        *,
        curvature: str = "auto",
        every: int | None = None,
        sharpness_matvecs: int = 8,
        inverse_sqrt: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
        average: bool = False,
        max_consecutive_skips: int | None = None,
        process_group: Any = None,
    ) -> None:
        groups.check_base(base)
        params = [p for group in base.param_groups for p in group["params"]]
        replicas = Replicas(process_group)
        replicas.check(params)
        refuse_gauss_newton(curvature, params)
        first = params[0]
        zero = torch.zeros((), dtype=scalar_dtype(first.device), device=first.device)
        tracker = SharpnessTracker(base, num_matvecs=sharpness_matvecs, inverse_sqrt=inverse_sqrt)
        self._rule = rate_rule(
            tuner_or_search, zero, curvature=curvature, every=every, tracker=tracker
        )
        skips = SkipCount(first.device, max_consecutive_skips)
        multipliers = [groups.multiplier(group, base.defaults) for group in base.param_groups]
        # Up to here `base` is unmodified, so an error leaves it usable. Optimizer.__init__ would
        # replace groups and state, which this wrapper shares with its base; __setstate__ only sets
        # up the hooks.
        self.base = base
        self.defaults = {**base.defaults, "lr": 1.0}
        self.__setstate__({})
        self._rate = zero
        self._skips = skips
        self._average = WeightAverage(first.device) if average else None
        self._micro_batches = MicroBatches()
        self._replicas = replicas
        self.last: StepInfo | None = None
        for group, weight in zip(base.param_groups, multipliers, strict=True):
            groups.adopt(group, weight, zero)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the base; ``lr`` is the multiplier, ``tuned_lr`` the rate in use."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the base."""
        return self.base.state

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, without the graphs of micro-batches."""
        return {**self.__dict__, "_micro_batches": MicroBatches()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``lr`` is a multiplier of the tuned rate (default 1.0).

        Parameters
        ----------
        param_group : dict
            As for every ``torch.optim`` optimizer.
        """
        weight = validation.nonnegative("lr", param_group.get("lr", 1.0))
        groups.check_params(param_group["params"])
        self.base.add_param_group({**param_group, "lr": weight})
        groups.adopt(self.base.param_groups[-1], weight, self._rate)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of base and tuner; the tuner's scalars are Python numbers.

        Returns
        -------
        dict
            Shaped as for every ``torch.optim`` optimizer; loads with
            ``torch.load(weights_only=True)``.
        """
        rule, average, params = self._rule, self._average, self._trainable()
        vectors = {}
        if rule.tracker is not None:
            vectors[checkpoint.EIGENVECTOR] = rule.tracker.saved(params)
        if average is not None:
            vectors[checkpoint.AVERAGE] = average.saved(params)
        tuner = checkpoint.SavedTuner(
            checkpoint.numbers_of(rule.state),
            int(self._skips.total),
            rule.progress,
            0 if average is None else average.taken,
        )
        return checkpoint.write(super().state_dict(), self.base, tuner, vectors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; everything is checked before anything changes.

        The state of a plain optimizer loads too, with a warning: the tuner then starts cold and the
        multipliers stay as they are.

        Parameters
        ----------
        state_dict : dict
            The state of an optimizer with the same base class, tuner and parameter shapes.

        Raises
        ------
        ValueError
            If the state belongs to another tuner or to other parameters, or holds a number that is
            negative or not finite, or a tensor of another shape.
        """
        saved, tuner, vectors = checkpoint.read(state_dict, self.base, self._rule.state)
        self.base.load_state_dict(saved)
        self._rule.load(tuner, vectors[checkpoint.EIGENVECTOR])
        if self._average is not None:
            self._average.load(
                vectors[checkpoint.AVERAGE], 0 if tuner is None else tuner.averaged_steps
            )
        self._skips.load(0 if tuner is None else tuner.skipped)
        self._rate = torch.full_like(self._rate, float(self.param_groups[0]["tuned_lr"]))
        for group in self.param_groups:
            group["tuned_lr"] = self._rate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and discard the losses given to `backward` since the last step."""
        self._micro_batches.free()
        self._micro_batches = MicroBatches()
        reshard(self._trainable())
        super().zero_grad(set_to_none)

    def backward(self, loss: Tensor, *, scaler: Any = None, sync: bool = True) -> None:
        """Differentiate a loss, instead of ``loss.backward()``; then clip, then `step()`.

        Gradients add up in ``p.grad``. Several calls before a step accumulate: the losses, their
        slopes and curvatures add up exactly too, so divide each loss by the number of micro-batches
        as usual. If the step measures the curvature, the graphs stay in memory until the step.
        Clip or change ``p.grad`` afterwards as you like; the slope remains that of the loss.

        Parameters
        ----------
        loss : Tensor
            A scalar with its graph.
        scaler : torch.amp.GradScaler, optional
            It scales the loss; the step is then ``scaler.step(optimizer)``. If the scaler skips it,
            `zero_grad` discards the measurement.
        sync : bool
            With several processes: whether to average the gradients now. Set it to False for all
            micro-batches but the last.

        Raises
        ------
        TypeError, ValueError
            If the loss is not a scalar with a graph, or if the line search or the method for the
            curvature needs a closure.
        """
        reason = self._rule.closure_reason
        if reason is not None:
            msg = (
                f"{reason} evaluates the loss again: pass a closure to step() instead of backward()"
            )
            raise ValueError(msg)
        params, batches = self._trainable(), self._micro_batches
        with defer_interrupts():
            try:
                methods = self._rule.methods_now
                batches.add(loss, params, methods=methods, scaler=scaler, sync=sync)
            finally:
                reshard(params)  # so that model.parameters() has the gradients, for clipping
            batches.reduced = self._replicas.size == 1
            if sync and not batches.reduced:
                assert batches.value is not None
                batches.value = self._replicas.average_gradients(params, batches.value)
                batches.reduced = True

    @overload  # type: ignore[override]
    def step(self, closure: Callable[[], Any]) -> Tensor: ...
    @overload
    def step(self, closure: None = None) -> Tensor | None: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:
        """Take one step.

        Parameters
        ----------
        closure : callable, optional
            Returns the loss, a scalar tensor with its graph, and does not call backward. It runs
            with gradients enabled. Leave it out after `backward`.

        Returns
        -------
        Tensor or None
            The loss before the step, detached (the mean over all processes); None if it is not
            known.

        Raises
        ------
        TypeError
            If neither a closure nor `backward` gave a loss, or the closure called backward or
            returned something other than a tensor.
        ValueError
            If the loss is not a scalar or does not depend on the parameters.
        RuntimeError
            If `max_consecutive_skips` steps in a row were skipped.

        Notes
        -----
        A step is atomic. If the closure raises in any call, or Ctrl-C arrives, everything is
        restored bit for bit: parameters, ``.grad``, the state of the base, averages, buffers and
        the random state. The exception are buffers that compiled modules changed in the first call.
        For this the old ``.grad`` is kept in memory; call `zero_grad` first to avoid that.
        """
        if self._average is not None and self._average.in_use:
            msg = "step was called inside averaged(): leave the block to go on training"
            raise RuntimeError(msg)
        # Without a closure nothing is evaluated here that would have to be restored.
        params = [] if closure is None else self._trainable()
        with restore_on_error(params) as effects, torch.no_grad():
            try:
                evaluation = self._evaluate(closure, effects)
                if evaluation is None:
                    self.base.step()
                    return None
                self._advance(evaluation)
            finally:
                self._micro_batches = MicroBatches()
                reshard(self._trainable())
        self._skips.raise_if_too_many()
        if isinstance(evaluation, ClosureLoss):
            return evaluation.value.to(evaluation.loss.dtype)
        return evaluation.value

    @contextmanager
    def averaged(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Give the parameters their averaged values inside a ``with`` block, to evaluate or save.

        Afterwards, also after an error, they are as before, bit for bit. Before the first step the
        averages are the present values.

        Parameters
        ----------
        model : torch.nn.Module, optional
            Its buffers are put back too. The running statistics of BatchNorm belong to the last
            weights, so recompute them for the averaged ones inside the block, for instance with
            ``torch.optim.swa_utils.update_bn``.

        Raises
        ------
        RuntimeError
            If no average is kept, or inside another such block.

        Examples
        --------
        >>> import torch
        >>> from cdat_torch import CDAT
        >>> w = torch.ones(1, requires_grad=True)
        >>> optimizer = CDAT(torch.optim.SGD([w]))
        >>> for _ in range(100):
        ...     loss = optimizer.step(lambda: (w * w).sum())
        >>> with optimizer.averaged():
        ...     evaluated = w.item()
        >>> 0 < w.item() < evaluated < 1
        True
        """
        if self._average is None:
            msg = "no average of the weights is kept; create the optimizer with average=True"
            raise RuntimeError(msg)
        buffers = [] if model is None else list(model.buffers())
        with self._average.swapped_in(self._trainable(), buffers):
            yield

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _evaluate(self, closure: Callable[[], Any] | None, effects: SideEffects) -> StepLoss | None:
        """Return the loss and its gradient, means over all processes; the latter is in ``p.grad``.

        Return None if all multipliers are 0 and there is no loss: the base then steps alone.
        """
        if closure is not None:
            if self._micro_batches:
                msg = "step got a closure after backward(): use one of the two"
                raise TypeError(msg)
            params = self._trainable()
            evaluation = closure_loss(closure, params, self._rule.methods_now, effects)
            evaluation.value = self._replicas.average_gradients(params, evaluation.value)
            return evaluation
        if self._micro_batches:
            if not self._micro_batches.reduced:
                msg = "the last backward() before a step must have sync=True"
                raise RuntimeError(msg)
            return self._micro_batches
        if all(float(group["lr"]) == 0 for group in self.param_groups):
            return None  # distributed checkpointing steps like this to create the state
        if not self._rule.needs_loss:
            return PlainGradient([p for p in self._trainable() if p.grad is not None])
        msg = (
            "step needs the loss: pass a closure that returns it, or call optimizer.backward(loss) "
            "instead of loss.backward()"
        )
        raise TypeError(msg)

    def _advance(self, evaluation: StepLoss) -> None:
        """Ask the base for the direction and the tuner for the rate, and move."""
        value = evaluation.value
        params = [p for p in self._trainable() if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        if not all_finite(grads if value is None else [value, *grads]):
            self._rule.skip()
            decision = Decision.skipped(self._rate)
        else:
            held = self._rule.try_held_step(self.base, value, replicas=self._replicas)
            decision = held or self._measure_and_move(evaluation, params)
        self._rate = decision.rate
        self._skips.add(decision.skip)
        if self._average is not None:
            self._average.add(self._trainable(), skip=decision.skip)
        for group in self.param_groups:
            group["tuned_lr"] = decision.rate
        self.last = decision.info(value, self._skips.total)

    def _measure_and_move(self, evaluation: StepLoss, params: list[Tensor]) -> Decision:
        """Let the base propose its step, measure along it, and move at the tuned rate."""
        rule = self._rule
        may_fail = rule.measures or rule.closure_reason is not None or self._replicas.size > 1
        step = BaseStep(
            self.base,
            params,
            reversible=may_fail,
            needs_state=rule.tracker is not None,
            along_step=rule.along_step,
        )
        with step:  # an error in here rolls it back
            decision = rule.choose(
                evaluation, params, step.direction, present=self._rate, replicas=self._replicas
            )
        step.commit(decision.rate, skip=decision.skip)
        return decision
