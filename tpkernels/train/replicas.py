"""The replicas of a model in training: what each learns from, when they average, whether they still are the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.comm.layout import rows_of
from tpkernels.data_parallel import AggregatorState, GradAggregator, OuterSGD, TopK
from tpkernels.data_parallel.agree import replicas_agree
from tpkernels.train.settings import Settings

TOPK_RATIO = 0.0195  # a value travels with its index in 6.1 bytes: 3 % of what all take in fp32
DELAY_FROM = 10  # steps of mode delayed that are synchronous


class Replicas:
    """This rank's view of the other replicas.

    Attributes:
        rows: the sequences of each batch that this replica learns from.
        weight: factor of this replica's mean loss, so that the average over the replicas is the mean over the batch; 1
            when all have equally many sequences.
        aggregator: of this rank's part of the model.
    """

    def __init__(self, model: nn.Module, group: Group, settings: Settings) -> None:
        """Collective over the ranks of `group`, which hold the same part of each replica."""
        self.model, self.group = model, group
        self.rows = rows_of(settings.batch, group)
        self.weight = len(self.rows) * group.world_size / settings.batch
        self._sent, self._closed = 0, False
        self.aggregator = GradAggregator(
            model,
            group=group,
            codec=settings.grad_codec,
            mode=settings.grad_mode,
            warmup_steps=min(DELAY_FROM, settings.effective_warmup),
            local_steps=settings.local_steps,
            outer=OuterSGD(lr=1.0, momentum=0.0, nesterov=False),  # few local steps want the plain mean
            topk=_topk(settings),
        )

    def mean(self, value: float) -> float:
        """The mean over the replicas, the same bits on all of them."""
        one = torch.tensor([value], dtype=torch.float64)
        return float(ops.all_reduce(one, group=self.group, op="avg").item())

    def check_same(self) -> None:
        """Raise on all ranks of the group when a parameter has other bits here than in another replica.

        Raises:
            RankMismatchError: names the first such parameter.
        """
        replicas_agree(self.model, group=self.group).check()

    def wait(self) -> bool:
        """Put the averages into the gradients; whether there are any to apply (see GradAggregator.wait)."""
        return self.aggregator.wait()

    def after_step(self) -> None:
        """Average the parameters when it is time (mode local)."""
        self.aggregator.after_step()

    def drain(self) -> bool:
        """End what is under way; whether gradients are still to be applied."""
        return self.aggregator.drain()

    def bytes_sent(self) -> int:
        """By this rank since the start, for averaging."""
        return self._sent if self._closed else int(self.aggregator.stats()["wire_bytes"])

    def close(self) -> None:
        """Leave the other replicas; what was counted stays."""
        self._sent, self._closed = self.bytes_sent(), True
        self.aggregator.close()


def _topk(settings: Settings) -> TopK:
    """The same bytes a step in all modes: fewer messages may be longer."""
    each = settings.local_steps if settings.grad_mode == "local" else 1
    return TopK(min(1.0, TOPK_RATIO * each), warmup_steps=settings.effective_warmup // each)


class OwnState:
    """What a checkpoint takes from every replica, not from the first alone.

    That is the state of the aggregator and, in mode local, where replicas differ between two averages and each has
    moments of its own, parameters and optimizer state as well. To a checkpoint it looks like an aggregator.
    """

    def __init__(self, replicas: Replicas, optimizer: torch.optim.Optimizer) -> None:
        self._aggregator, self._optimizer = replicas.aggregator, optimizer
        self._parameters = dict(replicas.model.named_parameters())
        self._loaded: dict[str, Tensor] = {}

    def state_dict(self) -> AggregatorState:
        """The state of this rank."""
        state = self._aggregator.state_dict()
        if self._aggregator.mode != "local":
            return state
        own = {key: tensor.detach().clone() for key, tensor in self._own().items()}
        return {"tensors": state["tensors"] | own, "numbers": state["numbers"] | {"own_parameters": True}}

    def load_state_dict(self, state: AggregatorState) -> None:
        """Give the aggregator its part; the rest waits for `finish`, because the first replica's is loaded later."""
        numbers = {key: number for key, number in state["numbers"].items() if key != "own_parameters"}
        kept = {key: tensor for key, tensor in state["tensors"].items() if not key.startswith("replica_")}
        self._aggregator.load_state_dict({"tensors": kept, "numbers": numbers})
        self._loaded = {key: tensor for key, tensor in state["tensors"].items() if key not in kept}

    @torch.no_grad()
    def finish(self) -> None:
        """Put this replica's own values in place, after the checkpoint has been loaded."""
        for key, tensor in self._own().items() if self._loaded else ():
            tensor.copy_(self._loaded[key])

    def _own(self) -> dict[str, Tensor]:
        """Parameters and the optimizer's tensors of their shape, as "replica_<what>.<parameter>"."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            found[f"replica_value.{name}"] = parameter
            for field, value in self._optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    found[f"replica_{field}.{name}"] = value
        return found
