"""Sends each step from rank 0 to the other ranks, and carries it out on every rank.

A message is one small all_reduce to which only rank 0 contributes: a command, how to compute prompts, the last token of
every slot, and the size of the second message, a JSON text of prompts that begin. So a step costs one more collective
than its forward has, and only rank 0 draws tokens and has a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group

STEP, STOP = 1, 2
HEAD = 3  # numbers before the tokens: command, whether prompts are computed together, bytes of the text
NO_TOKEN = -1


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        tokens: {slot: the last token of its sequence}, of the sequences that continue.
        begin: {slot: prompt}, of those that begin; they replace the sequence in the slot.
        together: compute them in common passes.
        stop: end `follow` instead.
    """

    tokens: Mapping[int, int] = field(default_factory=dict)
    begin: Mapping[int, list[int]] = field(default_factory=dict)
    together: bool = False
    stop: bool = False


class Channel:
    """Carries steps from rank 0 to the others."""

    def __init__(self, group: Group, slots: int) -> None:
        self._group, self._slots = group, slots

    def send(self, step: Step) -> None:
        """Send a step to the other ranks; called on rank 0.

        Raises:
            TimeoutError, PeerLostError: a rank did not take part, or died.
        """
        if self._group.world_size == 1:
            return
        text = json.dumps({str(slot): ids for slot, ids in step.begin.items()}).encode() if step.begin else b""
        head = [STOP if step.stop else STEP, step.together, len(text)]
        head += [step.tokens.get(slot, NO_TOKEN) for slot in range(self._slots)]
        self._carry(torch.tensor(head))
        if text:
            self._carry(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def receive(self) -> Step:
        """The next step of rank 0; called on the other ranks."""
        command, together, size, *tokens = self._carry(torch.zeros(HEAD + self._slots, dtype=torch.int64)).tolist()
        begin: dict[str, list[int]] = {}
        if size:
            begin = json.loads(bytes(self._carry(torch.zeros(size, dtype=torch.uint8)).numpy()))
        going_on = {slot: token for slot, token in enumerate(tokens) if token != NO_TOKEN}
        prompts = {int(slot): ids for slot, ids in begin.items()}
        return Step(going_on, prompts, bool(together), command == STOP)

    def _carry(self, mine: Tensor) -> Tensor:
        return ops.all_reduce(mine, group=self._group)


def carry_out(decoder: Any, step: Step) -> dict[int, Tensor]:
    """Run a step on this rank: {slot: logits [V]} of every slot in it."""
    found = dict[int, Tensor]()
    if step.tokens:
        logits = decoder.step(step.tokens)
        found |= {slot: logits[slot] for slot in step.tokens}
    found |= decoder.fill(step.begin, together=step.together)
    return found


def follow(decoder: Any, group: Group, slots: int) -> None:
    """Run the steps of rank 0 until it stops; called on the other ranks.

    Between requests they sleep: rank 0 sends an empty step more often than the group's deadline.

    Raises:
        TimeoutError, PeerLostError: a rank did not take part, or died.
    """
    channel = Channel(group, slots)
    while not (step := channel.receive()).stop:
        carry_out(decoder, step)
