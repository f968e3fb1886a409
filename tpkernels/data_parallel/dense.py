"""The average of a bucket over the ranks, every value of it, packed by a codec."""

from __future__ import annotations

from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group

from .buckets import Bucket
from .feedback import average_with_feedback

State = dict[str, Tensor]
"""The state of a bucket between steps: flat fp32 tensors by kind."""


class DenseAverage:
    """mean = (x_0 + ... + x_{R-1}) / R with every contribution packed by a codec, the same bits on every rank.

    With error feedback the rounding errors of a step, on the way to the owner of a part and on the way back, are added
    to the next one (residual, in units of the average; see average_with_feedback). Values are scaled in fp32 before
    they are packed: sums of large values do not overflow on the wire, and the block exponents of the codecs keep small
    ones.

    Args:
        codec: a name in `tpkernels.compress.CODECS`.
        error_feedback: keep residuals; codec "none" has none.

    Attributes:
        kinds: of its state, for each bucket.
    """

    def __init__(self, codec: str, error_feedback: bool) -> None:
        self.codec = codec
        self.kinds: tuple[str, ...] = ("residual",) if error_feedback and codec != "none" else ()

    def average(self, bucket: Bucket, flat: Tensor, state: State, step: int, group: Group) -> Tensor:
        """The average over the group, the same bits on all ranks. A collective.

        Where a value of any rank is not finite, the result is not, so that loss scaling finds it on every rank alike.
        The residual of such a block is unchanged.

        Args:
            bucket: of the message.
            flat: [bucket.numel], the dtype of the bucket; contiguous.
            state: of the bucket; its "residual", fp32 [bucket.numel], is updated in place.
            step: unused.
            group: the ranks.

        Returns:
            [bucket.numel], the dtype of the bucket.

        Raises:
            TimeoutError, PeerLostError, RankMismatchError: a rank was late, died, or sent another message.
        """
        if not self.kinds:
            return ops.all_reduce(flat, group=group, op="avg", codec=self.codec)
        return average_with_feedback(flat, state["residual"], self.codec, group)

    def part(self, bucket: Bucket, mean: Tensor, position: int, group: Group) -> Tensor:
        """The average of one member, in its shape: a view."""
        return bucket.part(mean, position)
