"""The average of a bucket over the ranks, every value of it, packed by a codec."""

from __future__ import annotations

from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group

from .buckets import Bucket
from .feedback import average_with_feedback

State = dict[str, Tensor]
"""What a bucket keeps between steps: flat fp32 tensors by kind."""


class DenseAverage:
    """mean = (x_0 + ... + x_{R-1}) / R with every contribution packed by a codec, the same bits on every rank.

    With error feedback what packing loses of a step, on the way to the owner of a part and on the way back, goes with
    the next one (residual, in units of the average; see average_with_feedback). Values are scaled in fp32 before they
    are packed: sums of large values do not overflow on the wire, and the block exponents of the codecs keep small ones.

    Attributes:
        kinds: what it keeps for each bucket.
    """

    def __init__(self, codec: str, error_feedback: bool) -> None:
        self.codec = codec
        self.kinds: tuple[str, ...] = ("residual",) if error_feedback and codec != "none" else ()

    def average(self, bucket: Bucket, flat: Tensor, state: State, step: int, group: Group) -> Tensor:
        """The average of flat over the group, in the dtype of the bucket. A collective; updates the state.

        Where a value of any rank is not finite, the result is not: loss scaling sees it on every rank alike. What is
        kept of such a block stays as it was.
        """
        if not self.kinds:
            return ops.all_reduce(flat, group=group, op="avg", codec=self.codec)
        return average_with_feedback(flat, state["residual"], self.codec, group)
