"""The balancer: a method at work, and what it remembers, as a part of the root module.

The root module calls it once per window (the micro-batches of one optimizer step), in this order:

    1. `needs_at(step)`       what `weights` wants to see of this window: "nothing" more than its labels,
                              the global "losses", the "gramian" as well, or the "jacobian"
    2. `weights(...)`         once per window, identically on every rank; the only place where state of the
                              method changes while it solves
    3. `combine(...)`         once per micro-batch: the scalar of the one backward
    4. `observe(...)`         once per window, with its global losses
    5. `end_epoch()`          once per epoch of the data

`method.py` has the shapes, and what a method is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.balance.jacobian import JacobianMethod
from mtl_dist.balance.method import BalancedTasks, Key, Method, Needs, State, Window


class Balancer(nn.Module):
    """One method for these tasks; its state_dict carries the method's state.

    Buffers, besides the method's own:
        last_weights_T   float32, each task's weight in the last window in which it took part: what is used
                         again where a window has no solution
        num_unconverged  int64, the windows that had no solution (no convergence, or numbers not finite)
    """

    last_weights_T: Tensor
    num_unconverged: Tensor

    def __init__(self, method: Method, tasks: BalancedTasks) -> None:
        super().__init__()
        self.method = method
        self.tasks = tasks
        self.needs = method.needs
        self.observes = method.observes
        self.level = method.where
        self.every = method.period
        self.scale_heads = method.scales_heads
        self.register_buffer("last_weights_T", torch.full((len(tasks),), method.first_weight(len(tasks))))
        self.register_buffer("num_unconverged", torch.zeros((), dtype=torch.int64))
        memory = method.memory(tasks)
        self._sized_by_first_window = {name for name, value in memory.items() if value.numel() == 0}
        for name, value in memory.items():
            self.register_buffer(name, value)
        for name, value in method.constants(tasks).items():
            self.register_buffer(name, value, persistent=False)
        # One parameter per task, not one vector: an optimizer would move the entries of absent tasks by their
        # momentum. Of shape (1,): DeepSpeed cannot broadcast a parameter without dimensions.
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(1)) for name in (tasks.names if method.learns else ())}
        )

    @property
    def state(self) -> State:
        """The method's state; `scales_T` is differentiable."""
        state = dict(self.named_buffers(recurse=False))
        if self.method.learns:
            state["scales_T"] = torch.cat([self.scales[name] for name in self.tasks.names]).float()
        return state

    def needs_at(self, step: int) -> Needs:
        """What `weights` must be given at this step; "nothing" in the steps between two solves."""
        return self.needs if step % self.every == 0 else "nothing"

    @torch.no_grad()
    def weights(
        self,
        *,
        present_T: Tensor,
        key: Key,
        losses_T: Tensor | None = None,
        gramian_TT: Tensor | None = None,
    ) -> Tensor:
        """The weights of this window: float32 (T,), detached, 0 for absent tasks.

        Identical on all ranks for identical arguments. `losses_T` are the window's global losses, for
        "losses" and "gramian"; `gramian_TT` the global Gramian of the tasks' gradients (float32), for
        "gramian". Rows of absent tasks are not looked at and may hold anything.

        Where there is no solution, the last weights are used and `num_unconverged` counts it.
        """
        proposed_T = self.method.propose(Window(present_T, key, losses_T, gramian_TT), self.state)
        usable = (proposed_T.isfinite() | ~present_T).all()
        if losses_T is not None:
            usable &= (losses_T.isfinite() | ~present_T).all()
        self.last_weights_T.copy_(torch.where(present_T & usable, proposed_T, self.last_weights_T))
        self.num_unconverged += ~usable
        return torch.where(present_T, self.last_weights_T, 0.0)

    @torch.no_grad()
    def aggregate(self, jacobian_TP: Tensor, *, losses_T: Tensor, present_T: Tensor, key: Key) -> Tensor:
        """The gradient (P,) of the shared parameters, of a method that needs the "jacobian".

        Once per window, identically on every rank. `jacobian_TP` has one row per task: the gradient of its
        global loss, in float32. Rows of absent tasks are not looked at and may hold anything. Where J or a
        loss is not finite the answer is not either, no state changes, and `num_unconverged` counts it: the
        step must be skipped.
        """
        assert isinstance(self.method, JacobianMethod)
        if not present_T.all():  # J is large: no copy without need.
            jacobian_TP = torch.where(present_T[:, None], jacobian_TP, 0.0)
        losses_T = torch.where(present_T, losses_T, 1.0)
        if not losses_T.isfinite().all():
            # Counted by `weights`, which sees the same losses.
            return torch.full_like(jacobian_TP[0], torch.nan)
        if not torch.stack(torch.aminmax(jacobian_TP)).isfinite().all():
            self.num_unconverged += 1
            return torch.full_like(jacobian_TP[0], torch.nan)
        return self.method.aggregate(jacobian_TP, losses_T, present_T, key, self.state)

    def combine(self, losses_T: Tensor, weights_T: Tensor, present_T: Tensor, scale: float = 1.0) -> Tensor:
        """The scalar for one backward, from one micro-batch's part of the losses.

        `losses_T` are differentiable, and such that their sum over the window's micro-batches and mean over
        ranks is the global loss. `scale` is this micro-batch's part of the window, 1 / accumulation: terms
        that do not depend on the data (the log-variances of uncertainty) are added in this proportion.
        Losses of absent tasks may be NaN.
        """
        # Through __call__: an engine that shards parameters gathers those of the balancer before it runs.
        scalar: Tensor = self(losses_T, weights_T, present_T, scale)
        return scalar

    def forward(self, losses_T: Tensor, weights_T: Tensor, present_T: Tensor, scale: float) -> Tensor:
        """See `combine`."""
        return self.method.combine(losses_T, weights_T, present_T, scale, self.state)

    @torch.no_grad()
    def observe(self, losses_T: Tensor, present_T: Tensor) -> None:
        """Let the method learn from a finished window's global losses."""
        self.method.observe(losses_T, present_T, self.state)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Let the method learn that an epoch of the data has ended."""
        self.method.end_epoch(self.state)

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """The trainable parameters that belong to one task alone; untouched while it is absent.

        Like a head's: their gradient is 0 in a window without the task, and the optimizer must pass them by.
        """
        return [self.scales[task]] if self.method.learns else []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balancer:
        # `root.bfloat16()` would round the state; buffers follow the device, never the precision.
        dtypes = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != dtype:
                self._buffers[name] = before[name].to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Sizes that the first window decides are the checkpoint's, also where a window has passed here.
        for name in self._sized_by_first_window:
            if (saved := state_dict.get(prefix + name)) is not None:
                self.get_buffer(name).resize_(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
