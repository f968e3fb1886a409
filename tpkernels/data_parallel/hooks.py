"""comm_hook: gradients of torch's DistributedDataParallel and fully_shard, averaged and packed by this library."""

# Annotations are not postponed in this file: DDP compares those of a hook with the types themselves.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from tpkernels import ops
from tpkernels.comm.group import Group, resolve
from tpkernels.comm.objects import global_ranks
from tpkernels.ops.checks import check_codec

from .checks import checked_scale
from .feedback import average_with_feedback
from .lane import NO_COPY, Lane, open_lane
from .weights import Weights

WHO = "comm_hook"


def comm_hook(
    codec: str = "fp16", error_feedback: bool = True, *, group: Group | None = None, reduce: str = "mean"
) -> "CommHook":
    """Make a hook through which DDP or FSDP2 averages gradients, packed on the wire.

        hook = comm_hook("fp16", group=dp)
        hook.register(model)                                 # DistributedDataParallel, or modules of fully_shard
        ddp.register_comm_hook(hook.state, hook)             # the same for DDP, by torch's method

    Equal to, for the gradients x_r of a bucket on rank r, with one residual for each parameter:

        v_r = x_r / R + residual_r;  wire_r = pack(v_r);  residual_r = v_r - unpack(wire_r)
        mean = sum_r unpack(wire_r)                          # in fp32, in rank order: the same bits on all ranks

    The rounding error of the packed mean is kept as well, by the rank that sums it (see `average_with_feedback`).

    Values are scaled in fp32 before they are packed: neither do sums of large gradients overflow nor do small ones
    vanish. A NaN or infinity on one rank shows on all; the residual of its block is unchanged.

    Under DDP the messages are sent beside the backward pass, over a communicator of the hook's own. FSDP2 calls each
    reduce-scatter when it needs the result, so that on the CPU the backward pass waits for it. The gathers of its
    parameters remain torch's, and so does the all-reduce between replicas of a sharded group.

    Args:
        codec: a name in `tpkernels.compress.CODECS`.
        error_feedback: rounding errors are kept and added to the next message (codec "none" loses nothing). Needs
            fp32 memory of the size of the gradients. A parameter that no rank used in a step loses its residual.
        group: the ranks over which DDP or FSDP2 works; None means all ranks of the default process group.
        reduce: "mean" over the ranks, weighted where `weigh` was called, or "sum" (of FSDP2: instead of its average).

    Raises:
        ValueError: no such codec or reduction.

    Source: error feedback of Seide et al. 2014 (1-bit SGD) and Karimireddy et al. 2019 (arXiv:1901.09847).
    """
    return CommHook(codec, error_feedback, resolve(group), reduce)


class Residuals:
    """The residuals of the codec in fp32, by parameter, so that they survive when DDP lays its buckets out anew."""

    def __init__(self) -> None:
        self._flats: dict[tuple[int, ...], Tensor] = {}
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}  # the parameter too: an id is unique while it lives

    def of(self, parameters: Sequence[Tensor], like: Tensor) -> Tensor:
        """The residual of a bucket, made of those of its parameters.

        Args:
            parameters: of the bucket, in its order.
            like: the bucket, [numel].

        Returns:
            [numel], fp32; the bucket's own from now on.

        Raises:
            RuntimeError: the parameters do not fill the bucket.
        """
        key = tuple(map(id, parameters))
        if key in self._flats:
            return self._flats[key]
        flat = torch.zeros_like(like, dtype=torch.float32)
        if sum(p.numel() for p in parameters) != flat.numel():
            raise RuntimeError(f"{WHO}: a bucket must be filled by its parameters, got {flat.numel()} values")
        for p, values in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            part = values.view(p.shape)  # in the order in which DDP lays it out, which is the same in every bucket
            if id(p) in self._parts:
                part.copy_(self._parts[id(p)][1])
            self._parts[id(p)] = (p, part)
        self._flats = {k: v for k, v in self._flats.items() if not set(k) & set(key)} | {key: flat}
        return flat

    def get(self, parameter: Tensor) -> Tensor | None:
        """The residual of a parameter, in its shape."""
        return self._parts[id(parameter)][1] if id(parameter) in self._parts else None

    def put(self, parameter: Tensor, residual: Tensor) -> None:
        """Replace the residual of a parameter."""
        known = self.get(parameter)
        if known is None:
            known = torch.empty_like(residual, dtype=torch.float32, device=parameter.device)
            self._parts[id(parameter)] = (parameter, known)
        known.copy_(residual)


class CommHook:
    """The hook that `comm_hook` makes.

    Attributes:
        codec, error_feedback, group: as given.
        state: the residuals of DDP's parameters; the first argument of `register_comm_hook`.
    """

    def __init__(self, codec: str, error_feedback: bool, group: Group, reduce: str = "mean") -> None:
        check_codec(WHO, codec, torch.float32)
        self._weights, self._loss_scale = Weights(WHO, reduce), 1.0
        self.codec, self.group = codec, group
        self.error_feedback = error_feedback and codec != "none"
        self.state = Residuals()
        self._scatters: dict[str, _ReduceScatter] = {}
        self._lane: Lane | None = None
        self.__name__ = WHO  # DDP reads these two, which functions have
        self.__qualname__ = f"{WHO}({codec!r}, error_feedback={error_feedback})"

    def register(self, model: nn.Module) -> None:
        """Send the gradients of a model through this hook, from the next backward pass on. All ranks call it.

        Args:
            model: wrapped by DistributedDataParallel over the ranks of the group; or one in which fully_shard was
                applied to some modules.

        Raises:
            TypeError: the model is neither.
            ValueError: its ranks are not those of the group, or a parameter does not fit the codec.
        """
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, DistributedDataParallel):
            self._check_ranks(model.process_group)
            for name, p in model.module.named_parameters():
                if p.requires_grad:
                    check_codec(f"{WHO}: parameter {name!r}", self.codec, p.dtype)
            self.lane()
            model.register_comm_hook(self.state, self)
            return
        sharded = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
        if not sharded:
            raise TypeError(
                f"{WHO}: model must be wrapped by DistributedDataParallel or sharded by fully_shard, got "
                f"{type(model).__name__}"
            )
        self.lane()
        for name, module in sharded.items():
            self._scatters[name] = _ReduceScatter(self)
            module.set_custom_reduce_scatter(self._scatters[name])  # type: ignore[arg-type]

    def __call__(self, state: Residuals | None, bucket: GradBucket) -> Future[Tensor]:
        """Send a bucket whose gradients are ready; DDP calls this. Without a state, with the hook's own.

        Raises:
            TimeoutError, PeerLostError: a rank was late, or died, in an earlier bucket. In the bucket in which it
                happens, torch makes a RuntimeError of it in the backward pass, with the same text.
        """
        flat = bucket.buffer()
        if flat.layout != torch.strided:
            raise ValueError(f"{WHO}: gradients must be dense, got layout {flat.layout}; set sparse=False")
        state = self.state if state is None else state
        residual = state.of(bucket.parameters(), flat) if self.error_feedback else None
        sent = self.lane().submit(partial(self._average, flat, residual))
        return sent.then(_value)

    def _average(self, flat: Tensor, residual: Tensor | None) -> Tensor:
        group = self.lane().group
        self._weighted(flat)
        if residual is None:
            average = ops.all_reduce(flat, group=group, op="avg", codec=self.codec)
        else:
            average = average_with_feedback(flat, residual, self.codec, group)
        factor = self._weights.factor(group.world_size)
        return average if factor == 1.0 else average.mul_(factor)

    def _weighted(self, flat: Tensor) -> None:
        """Multiply the message by the weight of this rank, in the bucket, which the average overwrites."""
        scale = self._weights.scale(self.group.world_size)
        if scale != 1.0:
            flat.mul_(scale)

    def weigh(self, weight: float | Tensor) -> None:
        """Set the weight of this rank's gradients from the next backward pass on, such as its number of tokens.

        All ranks call it alike, between steps, and it holds until it is called again. With reduce "mean" the gradients
        become sum_r w_r g_r / sum_r w_r, with "sum" sum_r w_r g_r. Inside DDP.join, where some ranks make no calls,
        it cannot be used: there every rank counts, and one that has no more batches adds zero.

        Args:
            weight: finite, 0 or more; of a tensor its one value.

        Raises:
            ValueError: the weight is negative or not finite; all ranks have 0 (from the backward pass).
        """
        self._weights.set(weight, self.lane())

    def set_loss_scale(self, scale: float) -> None:
        """Set the factor of the loss in later steps; call it on all ranks alike, between steps.

        The residuals of earlier gradients are brought to the new scale. With a scaler:

            hook.set_loss_scale(scaler.get_scale())            # before the backward pass of a step

        Args:
            scale: above 0; 1 at first.

        Raises:
            ValueError: it is not above 0, or not finite.
        """
        factor, self._loss_scale = checked_scale("CommHook", scale) / self._loss_scale, scale
        for flat in self._residuals():
            flat.mul_(factor)

    def _residuals(self) -> list[Tensor]:
        scattered = [flat for scatter in self._scatters.values() for flat in scatter.residuals.values()]
        return [part for _, part in self.state._parts.values()] + scattered

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{NO_COPY}, got {self.__qualname__} over group {self.group.label!r}")

    def lane(self) -> Lane:
        """The lane of the messages; opened by the first call, on all ranks together."""
        if self._lane is None:
            self._lane = open_lane(self.group)
        return self._lane

    def stats(self) -> dict[str, Any]:
        """Counters of the hook's communicator, see Group.stats; only after `register`, or the first message."""
        lane = self._opened("stats")
        return lane.call(lane.group.stats)

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        lane = self._opened("reset_stats")
        lane.call(lane.group.reset_stats)

    def _opened(self, what: str) -> Lane:
        if self._lane is None:
            raise RuntimeError(f"{WHO}.{what}: the hook must be registered first, got one that has sent nothing")
        return self._lane

    def close(self) -> None:
        """Close the communicator; the model can make no backward pass after it. Closing twice does nothing."""
        if self._lane is not None:
            self._lane.close()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The residuals of this rank, copied: every rank has its own. Call it between steps.

        In units of the average, at a loss scale of 1: for another number of ranks the sum over all ranks must stay the
        same.

        Args:
            model: the one that was registered.

        Returns:
            {"residual.<parameter>": in its shape} for DDP; {"residual.<module>:<values>": flat} for the modules of
            fully_shard, by the number of values that take part.
        """
        found = {
            f"residual.{name}": residual.detach().clone(memory_format=torch.contiguous_format).div_(self._loss_scale)
            for name, p in _inner(model).named_parameters()
            if (residual := self.state.get(p)) is not None
        }
        for name, scatter in self._scatters.items():
            found |= {f"residual.{name}:{numel}": flat / self._loss_scale for numel, flat in scatter.residuals.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor], model: nn.Module) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            ValueError: the state is not one of this model (says which entry); nothing has changed.
        """
        parameters = dict(_inner(model).named_parameters())
        puts: list[Any] = []
        for key, kept in state.items():
            residual = kept * self._loss_scale
            name = key.removeprefix("residual.")
            module, _, numel = name.rpartition(":")
            if name in parameters and residual.shape == parameters[name].shape:
                puts.append(partial(self.state.put, parameters[name], residual))
            elif module in self._scatters and numel == str(residual.numel()):
                puts.append(partial(self._scatters[module].put, residual))
            else:
                raise ValueError(f"{WHO}: {key!r} of shape {list(residual.shape)} belongs to nothing in this model")
        for put in puts:
            put()

    def _check_ranks(self, process_group: dist.ProcessGroup) -> None:
        ranks, theirs = global_ranks(self.group), dist.get_process_group_ranks(process_group)
        if ranks != theirs:
            raise ValueError(f"{WHO}: group must have the ranks of the model, {theirs}, got {ranks}")


class _ReduceScatter:
    """The argument of FSDPModule.set_custom_reduce_scatter, one for each module of fully_shard.

    Attributes:
        residuals: of the codec, flat, by the number of values, which changes with the set of parameters that have a
            gradient.
    """

    def __init__(self, hook: CommHook) -> None:
        self._hook = hook
        self.residuals: dict[int, Tensor] = {}

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a message that is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """output = this rank's even part of the sum or average of the ranks' inputs, both flat."""
        hook = self._hook
        hook._check_ranks(group)
        if async_op:
            raise NotImplementedError(f"{WHO}: async_op must be False, got True")
        kinds = {"avg": op == dist.ReduceOp.AVG, "sum": op == dist.ReduceOp.SUM}
        if not any(kinds.values()):
            raise ValueError(f"{WHO}: gradients must be averaged or summed (no set_gradient_divide_factor), got {op}")
        kind = "avg" if kinds["avg"] else "sum"
        hook.lane().submit(partial(self._reduce, output_tensor, input_tensor, kind)).wait()

    def _reduce(self, output: Tensor, flat: Tensor, kind: str) -> None:
        hook, group = self._hook, self._hook.lane().group
        hook._weighted(flat)
        factor = hook._weights.factor(group.world_size)
        if not hook.error_feedback:
            output.copy_(ops.reduce_scatter(flat, group=group, op=kind, codec=hook.codec)).mul_(factor)
            return
        residual = self.residuals.get(flat.numel())
        if residual is None:
            residual = self.residuals[flat.numel()] = torch.zeros_like(flat, dtype=torch.float32)
        scale = 1.0 / group.world_size if kind == "avg" else 1.0
        wire = ops.compress_parts(flat, hook.codec, group=group, residual=residual, scale=scale)
        part = ops.reduce_scatter_packed(wire, flat.numel(), flat.dtype, group=group, codec=hook.codec)
        output.copy_(part).mul_(factor)

    def put(self, residual: Tensor) -> None:
        """Replace the residual of messages of this size."""
        self.residuals[residual.numel()] = residual.detach().to(self._hook.group.device, torch.float32, copy=True)


def _value(future: Future[Tensor]) -> Tensor:
    """The result of a job. Raised from here, its error reaches torch as an error, and not as a result."""
    return future.value()


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
