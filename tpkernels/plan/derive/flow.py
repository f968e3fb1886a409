"""Follow every feature of every linear layer through one run of a model: which features meet, and where they arrive.

The run is real Python over meta tensors (or real ones). Beside each tensor that depends on a linear or an embedding
goes a tensor of labels of the same shape: label i marks an element of feature i. Views, permutations and
slices move labels as they move values; where two features meet in one element (a sum, a product, a contraction, a
norm), they must stay on one rank, which is an edge between their labels. What no rule below knows makes all its
features meet. So after the run the connected labels are the units of a cut: heads, kv groups, single features.

Source of the idea: sharding propagation as in GSPMD (arXiv:2105.04663), on features instead of dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from tpkernels.plan.derive.calls import Step, argument, call, side_by_side, tensors_in
from tpkernels.plan.derive.labels import (
    NONE,
    WHOLE,
    Edges,
    all_of,
    broadcast,
    compact,
    core,
    flat,
    joined,
    meet,
    meet_all,
    meet_along,
    reshaped,
)

# Ops that move elements: the labels take the same way. VIEWS go by strides, which differ.
VIEWS = {"view", "_unsafe_view", "reshape"}
MOVES = {"permute", "transpose", "t", "expand", "slice", "select", "unbind", "split", "split_with_sizes", "squeeze"}
MOVES |= {"unsqueeze", "repeat", "flip", "roll", "unfold", "diagonal", "movedim", "narrow"}
PICKS = {"index", "index_select", "gather", "embedding"}
KEEPS = {"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "zeros_like", "ones_like", "empty_like"}
KEEPS |= {"full_like", "rand_like", "randn_like", "bernoulli", "_conj", "to", "native_dropout", "_prelu_kernel"}
ALONG = {"_softmax", "_log_softmax", "_safe_softmax", "cumsum", "logcumsumexp", "sort", "argsort", "cumprod"}
REDUCES = {"sum", "mean", "amax", "amin", "var", "var_mean", "std", "linalg_vector_norm", "prod", "logsumexp", "any"}
REDUCES |= {"all", "max", "min", "argmax", "argmin", "norm"}
FACTORIES = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
NORMS = {"native_layer_norm": 1, "_fused_rms_norm": 1}
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A run in which labels are followed. Modules of `sources` start features; at their inputs features arrive.

    Args:
        sources: {name: module}: linears, Conv1D, embeddings that may be cut.
        parameters: {name: the tensor that replaces this parameter in the run}.
        closed: {name: module}: what is cut by itself, if at all: it takes whole features and gives whole ones.
    """

    def __init__(
        self, sources: dict[str, nn.Module], parameters: dict[str, Tensor], closed: dict[str, nn.Module]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.edges = Edges()
        self.first: dict[str, Tensor] = {}  # source -> labels of its output features
        self.arrived: dict[str, Tensor] = {}  # source -> labels of its input features, where they are labelled
        self.plain: set[str] = set()  # sources that were called with an input that no feature reached
        self.called: list[str] = []  # sources in the order of their first call
        self.used: set[str] = set()  # parameters that an op outside of a source's own forward takes
        self.returned: set[str] = set()  # parameters on which the output depends past all features
        self.dropped: list[tuple[str, Tensor]] = []  # a dropout and the labels of what it drops
        self.steps: list[Step] = []  # calls of sources, and dropouts with any rate, in their order
        self.met: list[tuple[str, Tensor]] = []  # a replicated parameter and the labels it met
        self.trace: list[tuple[str, tuple[float, ...], str]] = []  # op, numbers, module: where features take part
        self._labels: Any = WeakIdKeyDictionary()
        self._learned: Any = WeakIdKeyDictionary()  # depends on parameters, but not on a feature
        self._parameters: Any = WeakIdKeyDictionary()
        self.take_parameters(parameters)
        self._even: Any = WeakIdKeyDictionary()  # constants: the dimensions along which all is the same
        self._written: dict[int, tuple[int, Any]] = {}  # memory -> a label that all in it has, and what keeps it alive
        self.sources, self.closed = sources, closed
        self._quiet = 0
        self._stack: list[str] = [""]
        self._next = WHOLE + 1

    def take_parameters(self, parameters: dict[str, Tensor]) -> None:
        """Register the tensors that replace parameters, {name: tensor}."""
        for name, tensor in parameters.items():
            self._parameters[tensor] = name

    @property
    def where(self) -> str:
        """The name of the module that runs, or in which an error ended the run."""
        return self._stack[-1]

    # ---- modules ---------------------------------------------------------------------------------------------------

    @contextmanager
    def hooked(self, model: nn.Module, paths: dict[nn.Module, str]) -> Iterator[None]:
        """Hook the calls of all modules of a model; `paths` are their names, for messages."""
        names = {module: name for name, module in self.sources.items()}
        handles = []
        for module in model.modules():
            enter = self._enter(paths[module], names.get(module))
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(paths[module], names.get(module))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._quiet = 0

    def _enter(self, name: str, source: str | None) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stack.append(name)
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            labels = self.labels_of(given[0]) if isinstance(module, nn.Dropout) and module.p > 0 and given else None
            if labels is not None:
                with out_of_sight():
                    self.dropped.append((name, torch.unique(core(labels)[0])))
            if source is not None:
                self._quiet += 1
                self.steps.append(Step(source))
                with out_of_sight():
                    self._arrive(source, given[0] if given else None)
            if name in self.closed:
                self._quiet += 1
                self.called.append(name)
                with out_of_sight():
                    for t in given:
                        if (labels := self.labels_of(t)) is not None:
                            self.whole(labels, f"{name} takes them whole")

        return hook

    def _leave(self, name: str, source: str | None) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._stack.pop()
            if source is not None:
                self._quiet -= 1
                with out_of_sight():
                    self._start(source, output)
            if name in self.closed:
                self._quiet -= 1
                for tensor in tensors_in(output):
                    self._labels[tensor] = all_of(WHOLE, tensor.shape)

        return hook

    def _arrive(self, source: str, x: Tensor | None) -> None:
        if source not in self.called:
            self.called.append(source)
        labels = None if x is None else self.labels_of(x)
        if labels is None:
            if source in self.arrived:
                self.whole(self.arrived[source], f"{source} is also called with an input that is on all ranks")
            self.plain.add(source)
            return
        rows = labels.reshape(-1, labels.shape[-1]) if labels.dim() else labels.reshape(1, 1)
        reason = f"they arrive at the same input of {source}"
        seen = self.arrived.setdefault(source, rows[0].clone())
        meet(self.edges, rows, seen.expand_as(rows), reason)
        if isinstance(self.sources[source], nn.Embedding) or source in self.plain:
            self.whole(labels, f"{source} is also called with an input that is on all ranks")

    def _start(self, source: str, y: Tensor) -> None:
        if source not in self.first:
            self.first[source] = self.new_labels(source, y.shape[-1])
        if self.first[source].shape[0] != y.shape[-1]:
            raise RuntimeError(f"{source} gives {y.shape[-1]} features, expected {self.first[source].shape[0]}")
        self._labels[y] = self.first[source].expand(y.shape)

    def new_labels(self, source: str, n: int) -> Tensor:
        """Return the labels of the n output features of a source."""
        self._next += n
        return torch.arange(self._next - n, self._next, device="cpu")

    def drop(self, x: Tensor, rate: float) -> None:
        """Note that a dropout gets this tensor."""
        labels = self.labels_of(x)
        with out_of_sight():
            self.steps.append(Step(self.where, rate, None if labels is None else torch.unique(core(labels)[0])))

    @property
    def count(self) -> int:
        """The number of labels."""
        return self._next

    def whole(self, labels: Tensor, reason: str) -> None:
        """Mark features that every rank needs, so that they cannot be sharded."""
        meet_all(self.edges, labels, reason, also=WHOLE)

    def note_output(self, output: Any) -> None:
        """Mark the features in the output of the model: every rank needs them."""
        for tensor in tensors_in(output):
            labels = self.labels_of(tensor)
            if labels is not None:
                self.whole(labels, "it leaves the model")
            self.returned |= self._learned_from(tensor)

    # ---- ops -------------------------------------------------------------------------------------------------------

    def labels_of(self, x: Tensor) -> Tensor | None:
        """Return the labels of a tensor, None where no feature reached it."""
        if self._written:
            written = self._written.get(x.untyped_storage()._cdata)
            if written is not None:
                return all_of(written[0], x.shape)
        labels: Tensor | None = self._labels.get(x)
        return labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = None if self._quiet else self._before(func, args, kwargs)
        run_args, run_kwargs = side_by_side(args, kwargs)
        out = call(func, run_args, run_kwargs)
        if before is not None:
            self._follow(func, args, kwargs, out, *before)
        return out

    def _before(self, func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor | None]] | None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in tensors:
            if t in self._parameters:
                self.used.add(self._parameters[t])
        return tensors, [self.labels_of(t) for t in tensors]

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor], given: list[Any]) -> None:
        name = func.overloadpacket.__name__
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not any(labels is not None for labels in given):
            names = frozenset[str]().union(*(self._learned_from(t) for t in tensors))
            if names:
                for t in outs:
                    self._learned[t] = names
            elif len(outs) == 1:
                self._note_even(func, name, tensors, outs[0])
            return
        why = f"they meet in {name} in {self.where or 'the model'}"
        seen = torch.cat([core(labels)[0].reshape(-1)[:1] for labels in given if labels is not None])
        self.met.extend(
            (parameter, torch.unique(core(labels)[0]))
            for t, g in zip(tensors, given, strict=True)
            if g is None
            for parameter in self._learned_from(t)
            for labels in given
            if labels is not None
        )
        numbers = tuple(x for x in tree_leaves((args[1:], kwargs)) if isinstance(x, float))
        if name not in VIEWS | MOVES | KEEPS:  # of these other sizes may need others
            self.trace.append((name, numbers, self.where))
        if func._schema.is_mutable:
            self._write(func, args, tensors, given, why)
            return
        if not outs:  # a number, of which Python may make anything
            for labels in given:
                if labels is not None:
                    self.whole(labels, why)
            return
        found = self._rule(func, name, args, kwargs, tensors, given, outs, why)
        if found is None:  # not known: everything in it meets
            meet_all(self.edges, flat(given), why, also=int(seen[0]))
            found = [all_of(int(seen[0]), t.shape) for t in outs]
        for t, labels in zip(outs, found, strict=True):
            if labels is not None:
                assert labels.shape == t.shape, (name, labels.shape, t.shape)
                self._labels[t] = compact(labels)

    def _learned_from(self, x: Tensor) -> frozenset[str]:
        """The replicated parameters on which a tensor depends, which no feature reached."""
        if x in self._parameters:
            return frozenset([self._parameters[x]])
        found: frozenset[str] = self._learned.get(x, frozenset())
        return found

    def _note_even(self, func: Any, name: str, tensors: list[Tensor], out: Tensor) -> None:
        """Remember along which dimensions a constant has the same value everywhere."""
        dims = {-back for back in range(1, out.dim() + 1)}
        if name in FACTORIES:
            self._even[out] = frozenset(dims)
        elif torch.Tag.pointwise in func.tags and tensors:
            for t in tensors:
                dims -= {d for d in dims if t.dim() >= -d and t.shape[d] > 1 and d not in self._even_dims(t)}
            self._even[out] = frozenset(dims)

    def _even_dims(self, x: Tensor) -> frozenset[int]:
        found: frozenset[int] = self._even.get(x, frozenset())
        return found

    def _meet(self, tensors: Sequence[Tensor], given: Sequence[Any], out: Tensor, why: str) -> Tensor:
        return broadcast(self.edges, tensors, given, [self._even_dims(t) for t in tensors], out.shape, why)

    def _rule(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], given: list[Any], outs: Any, why: str
    ) -> list[Tensor | None] | None:
        edges = self.edges
        x = given[0]
        if name in ("cat", "stack"):
            return [self._join(name, args, kwargs, tensors, given, why)]
        if name in PRODUCTS:
            return self._product(PRODUCTS[name], tensors, given, outs[0], why)
        chosen = zip(tensors[1:], given[1:], strict=True)
        if name in PICKS and x is not None and not any(t.is_meta or g is not None for t, g in chosen):
            return [func(x, *args[1:], **kwargs)]
        if x is not None and len(tensors) == 1:
            if name in VIEWS:
                return [reshaped(x, outs[0].shape)]
            if name in MOVES:
                moved = func(x, *args[1:], **kwargs)
                return [moved] if isinstance(moved, Tensor) else list(moved)
            if name in KEEPS:
                return [x if t.shape == x.shape else None for t in outs]
            if name in ALONG:
                meet_along(edges, x, argument(func, args, kwargs, "dim", -1), why)
                return [x] * len(outs)
            if name in REDUCES:
                return self._reduce(func, x, args, kwargs, outs, why)
        if name in NORMS and x is not None:
            for dim in range(len(args[1])):
                meet_along(edges, x, x.dim() - 1 - dim, why)
            return [x if t.shape == x.shape else None for t in outs]
        if torch.Tag.pointwise in func.tags and len(outs) == 1:
            return [self._meet(tensors, given, outs[0], why)]
        return None

    def _join(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], given: list[Any], why: str) -> Tensor:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        labels = [all_of(NONE, t.shape) if g is None else g for t, g in zip(tensors, given, strict=True)]
        found = joined(labels, dim, new=name == "stack")
        if any(g is None and t.numel() for t, g in zip(tensors, given, strict=True)):
            # What is on all ranks beside what is cut: along every dimension in which the labels differ it has too much.
            for d in range(found.dim()):
                meet_along(self.edges, found, d, why)
            found = torch.where(found == NONE, found.max(), found)
        return found

    def _product(self, at: int, tensors: list[Tensor], given: list[Any], out: Tensor, why: str) -> list[Tensor | None]:
        """[added +] a @ b: what is summed over must meet, and so must a row's label and a column's."""
        (a, b), (la, lb) = tensors[at : at + 2], given[at : at + 2]
        rows = cols = None
        if la is not None:
            meet_along(self.edges, la, -1, why)
            rows = la[..., :1]
        if lb is not None:
            meet_along(self.edges, lb, -2, why)
            cols = lb[..., :1, :]
        ones = [
            torch.empty((*a.shape[:-1], 1), device="meta"),
            torch.empty((*b.shape[:-2], 1, b.shape[-1]), device="meta"),
        ]
        parts, labels = ([tensors[0], *ones], [given[0], rows, cols]) if at else (ones, [rows, cols])
        return [self._meet(parts, labels, out, why)]

    def _reduce(self, func: Any, x: Tensor, args: Any, kwargs: Any, outs: Any, why: str) -> list[Tensor | None]:
        dims = argument(func, args, kwargs, "dim", None)
        dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
        reduced = x
        for d in dims:
            meet_along(self.edges, x, d, why)
            reduced = reduced.narrow(d, 0, 1)
        return [reduced.reshape(t.shape) if reduced.numel() == t.numel() else None for t in outs]

    def _write(self, func: Any, args: Any, tensors: list[Tensor], given: list[Any], why: str) -> None:
        """An op that writes into its first tensor. Whatever shares that memory holds what was written."""
        target, name = args[0], func.overloadpacket.__name__
        if given[0] is not None and (torch.Tag.pointwise in func.tags or name in ("zero_", "fill_", "copy_")):
            self._meet(tensors, given, target, why)  # an element keeps its label in every view
            return
        labelled = flat(given)
        label = int(labelled[0])
        meet_all(self.edges, labelled, why + " (written in place)", also=label)
        storage = target.untyped_storage()
        self._written[storage._cdata] = (label, storage)


@contextmanager
def out_of_sight() -> Iterator[None]:
    """Run ops that no flow follows."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield
