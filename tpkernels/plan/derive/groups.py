"""Groups of linears that are sharded together, from labels: their units, and the order of the units in each linear."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from tpkernels.plan.derive.flow import Flow
from tpkernels.plan.derive.labels import WHOLE
from tpkernels.plan.derive.names import glob_of
from tpkernels.plan.styles.heads import HEAD_SIZE, HEADS, number


@dataclass
class LinearGroup:
    """Linears that can only be sharded together, because their outputs belong to the same units.

    Attributes:
        sources: their names, in the order of their calls.
        sinks: the linears whose inputs these features are.
        units: the number of units, which is the largest number of ranks; 0 when they cannot be sharded.
        styles: of sources and sinks, if sharded.
        summed: replicated parameters that meet the features; their gradients are partial if these are sharded.
        reason: why they cannot be sharded.
        weight: the number of parameters that would be sharded.
        drops: dropouts of its features.
        common: {module: rate} of dropouts of other features between its sources and sinks.
        counts: styles for the modules around that were not tried yet.
    """

    sources: list[str]
    sinks: list[str] = field(default_factory=list)
    units: int = 0
    styles: dict[str, str] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    reason: str = ""
    weight: int = 0

    drops: list[str] = field(default_factory=list)
    common: dict[str, float] = field(default_factory=dict)
    counts: list[dict[str, str]] | None = None

    def parents(self) -> list[str]:
        """The modules that hold its linears."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in (*self.sources, *self.sinks)))

    def pattern(self) -> tuple[str, ...]:
        """The names without their numbers: the same for the same block of all layers."""
        return tuple(dict.fromkeys(glob_of(name) for name in (*self.sources, *self.sinks)))

    def next_counts(self, model: nn.Module) -> bool:
        """Try the next set of numbers that may count units in the modules around; False when there is none left."""
        if self.counts is None:
            self.counts = possible_counts(model, self)
        for name in [n for n, style in self.styles.items() if style.startswith("counts:")]:
            del self.styles[name]
        if not self.counts:
            return False
        self.styles |= self.counts.pop(0)
        return True

    def refuse(self, reason: str) -> None:
        """Replicate it, for this reason."""
        self.units, self.reason = 0, self.reason or reason


def find_groups(flow: Flow, modules: dict[str, nn.Module], direct: dict[str, str]) -> list[LinearGroup]:
    """Return all groups of sources that were called, those that cannot be cut with the reason.

    Args:
        flow: after the run.
        modules: the sources.
        direct: {source: why} of sources whose parameters are used outside of their own forward.
    """
    root = flow.edges.classes(flow.count)
    called = [name for name in flow.called if name in flow.first]
    out = {name: root[flow.first[name].numpy()] for name in called}
    groups, group_of = _connect(called, out)
    into = {name: root[labels.numpy()] for name, labels in flow.arrived.items()}
    for name, classes in into.items():
        reached = {group_of.get(int(c), -1) for c in np.unique(classes)}
        for i in reached - {-1}:
            groups[i].sinks.append(name)
            if len(reached) > 1:
                groups[i].reason = f"at the input of {name} they lie beside others"
    _note_summed(flow, groups, group_of, root)
    for name, labels in flow.dropped:
        for i in {group_of[c] for c in root[labels.numpy()].tolist() if c in group_of}:
            groups[i].drops.append(name)
    for group in groups:
        _note_common(flow, group, group_of, root, groups)
        whole = [s for s in (*group.sources, *group.sinks) if s in direct]
        if whole and not group.reason:
            group.reason = direct[whole[0]] if whole[0] in group.sources[:1] else f"{whole[0]}: {direct[whole[0]]}"
        if group.summed & flow.returned and not group.reason:
            group.reason = f"{min(group.summed & flow.returned)} leaves the model, too"
        if not group.reason:
            _judge(flow, group, out, into, root, modules)
    return groups


def _connect(called: list[str], out: dict[str, np.ndarray]) -> tuple[list[LinearGroup], dict[int, int]]:
    """Sources that have a class of features in common are one group. Returns the groups and {class: group}."""
    parent = list(range(len(called)))
    owner: dict[int, int] = {}

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, name in enumerate(called):
        for c in np.unique(out[name]).tolist():
            a, b = find(owner.setdefault(c, i)), find(i)
            parent[max(a, b)] = min(a, b)
    numbers: dict[int, int] = {}
    groups: list[LinearGroup] = []
    for i, name in enumerate(called):
        place = numbers.setdefault(find(i), len(groups))
        if place == len(groups):
            groups.append(LinearGroup([]))
        groups[place].sources.append(name)
    return groups, {c: numbers[find(i)] for c, i in owner.items()}


def _note_summed(flow: Flow, groups: list[LinearGroup], group_of: dict[int, int], root: np.ndarray) -> None:
    for parameter, labels in flow.met:
        for c in np.unique(root[labels.numpy()][labels.numpy() >= 0]).tolist():
            if c in group_of:
                groups[group_of[c]].summed.add(parameter)


def _note_common(
    flow: Flow, group: LinearGroup, group_of: dict[int, int], root: np.ndarray, groups: list[LinearGroup]
) -> None:
    """Note the dropouts between a source and the sink behind it whose features do not belong to the group."""
    under_way = False
    for step in flow.steps:
        if step.rate is None:
            under_way = step.name in group.sources or (under_way and step.name not in group.sinks)
        elif under_way:
            classes = [] if step.labels is None else root[step.labels.numpy()].tolist()
            if not any(groups[group_of[c]] is group for c in classes if c in group_of):
                group.common[step.name] = max(step.rate, group.common.get(step.name, 0.0))


def _judge(
    flow: Flow,
    group: LinearGroup,
    out: dict[str, np.ndarray],
    into: dict[str, np.ndarray],
    root: np.ndarray,
    modules: dict[str, nn.Module],
) -> None:
    """Find the units of a group and the styles of its linears, or the reason why it is replicated."""
    if any(WHOLE in out[s] for s in group.sources) or not group.sinks:
        inside = np.isin(root, np.unique(np.concatenate([out[s] for s in group.sources])))
        group.reason = flow.edges.reason(root, inside) or "no linear takes what they give"
        return
    order = list(dict.fromkeys(into[group.sinks[0]].tolist()))
    if len(order) < 2:
        inside = np.isin(root, order)
        group.reason = flow.edges.reason(root, inside) or "all of their features must stay together"
        return
    for name in dict.fromkeys((*group.sources, *group.sinks)):
        if name in group.sources and name in group.sinks:
            group.reason = f"{name} takes what it gives"
            return
        column = name in group.sources
        sizes = segments(out[name] if column else into[name], order)
        if sizes is None or (len(sizes) > 1 and not column):
            side = "outputs" if column else "inputs"
            group.reason = f"the {side} of {name} are not in the order of the {len(order)} units that meet"
            return
        if isinstance(modules[name], nn.Embedding) and (not column or len(sizes) > 1 or not is_plain(modules[name])):
            group.reason = f"{name} is an embedding inside of them"
            return
        group.styles[name] = style_text(column, sizes, len(order))
        group.weight += sum(p.numel() for p in modules[name].parameters())
    group.units = len(order)


def is_plain(module: nn.Module) -> bool:
    """Whether the forward of an embedding is that of its class."""
    return type(module).forward is nn.Embedding.forward


def segments(classes: np.ndarray, order: list[int]) -> list[int] | None:
    """Return the sizes of the runs in which a linear holds all units, each in order, each the same number of times.

    [a a b b] is one segment, [a a b b a b] are two (a fused projection), [a b b a] is none: that is None.
    """
    sizes, at = [], 0
    while at < len(classes):
        run = 1
        while at + run < len(classes) and classes[at + run] == classes[at]:
            run += 1
        size = run * len(order)
        if not np.array_equal(classes[at : at + size], np.repeat(order, run)):
            return None
        sizes.append(size)
        at += size
    return sizes


def style_text(column: bool, sizes: list[int], units: int) -> str:
    """Return the style: units that are single features need no word."""
    if len(sizes) > 1:
        packed = str(len(sizes)) if len(set(sizes)) == 1 else ",".join(map(str, sizes))
        text = f"packed_column:{packed}"
    else:
        text = "column" if column else "row"
    unit = [size // units for size in sizes]
    return text if set(unit) == {1} else f"{text}:units={units}"


def refuse_unsummable(
    model: nn.Module, groups: list[LinearGroup], owners: dict[str, list[str]], sources: dict[str, nn.Module]
) -> None:
    """Refuse groups with a module some of whose parameters meet their features, but not all.

    Args:
        model: the full one.
        groups: of all runs.
        owners: {parameter: the modules that hold it}.
        sources: {name: module} that start features.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group.summed:
            for owner in owners[parameter]:
                own = {names[id(p)] for p in model.get_submodule(owner).parameters(recurse=False)}
                if not owner:
                    group.refuse(f"{parameter} meets them, and no rule can name the model itself")
                elif owner in sources or not own <= group.summed:
                    group.refuse(f"{parameter} meets them, and not all parameters of {owner} do")


def refuse_undroppable(model: nn.Module, groups: list[LinearGroup]) -> None:
    """Refuse groups whose dropouts are not between the columns and rows of one module, or of a block with heads.

    Only there does a rank draw numbers of its own.
    """
    for group in groups:
        for name, rate in group.common.items():
            if rate > 0 and not isinstance(model.get_submodule(name), _DropoutNd):
                group.refuse(f"{name} drops, by a function, what is on all ranks, while they are under way")
        columns, rows = ({name.rpartition(".")[0] for name in names} for names in (group.sources, group.sinks))
        blocks = all(number(model.get_submodule(name), (*HEAD_SIZE, *HEADS)) for name in columns)
        if group.drops and columns != rows and not blocks:
            group.refuse(f"{group.drops[0]} drops what is cut, and {min(columns)} does not hold {group.sinks[:1]}, too")
        # Of several stretches in one module only the one of its first linear is known.
        for parent in columns if group.drops else ():
            cut = {name for other in groups if other.units for name in other.sources}
            children = [f"{parent}.{key}" if parent else key for key, _ in model.get_submodule(parent).named_children()]
            if next((child for child in children if child in cut), group.sources[0]) not in group.sources:
                group.refuse(f"{group.drops[0]} drops what is cut, and {parent} cuts other linears before")


def common_dropouts(model: nn.Module, groups: list[LinearGroup]) -> dict[str, str]:
    """Return the style of dropouts of replicated features between sharded ones."""
    cut = [group for group in groups if group.units]
    found = {name for group in cut for name in group.common if isinstance(model.get_submodule(name), _DropoutNd)}
    return dict.fromkeys(found - {name for group in cut for name in group.drops}, "common")


def choose(groups: list[LinearGroup]) -> list[LinearGroup]:
    """Of the groups that can be cut take the heaviest ones that do not exclude each other, in the order of the run.

    A linear cannot be cut along its inputs and its outputs at once, so of a chain every second group is cut. Groups
    that share a replicated parameter are all cut, or none: only then is its gradient partial everywhere.
    """
    taken: dict[str, LinearGroup] = {}
    for group in sorted((g for g in groups if g.units), key=lambda g: -g.weight):
        both = [name for name in (*group.sources, *group.sinks) if name in taken]
        if both:
            group.refuse(f"{both[0]} is cut with {taken[both[0]].sources[0]} already")
        else:
            taken |= dict.fromkeys((*group.sources, *group.sinks), group)
    lost = True
    while lost:
        lost = False
        for group in (g for g in groups if g.units):
            for other in (g for g in groups if not g.units and g.summed & group.summed):
                group.refuse(f"{min(other.summed & group.summed)} also meets features that stay whole")
                lost = True
                break
    return [g for g in groups if g.units]


def possible_counts(model: nn.Module, group: LinearGroup) -> list[dict[str, str]]:
    """Return sets of numbers of the modules around a group that may count its units: heads, widths, or both.

    A run of the sharded model shows which of them do.
    """
    found: list[dict[str, str]] = []
    heads: dict[str, list[str]] = {}
    widths: dict[str, list[str]] = {}
    for parent in filter(None, group.parents()):  # no rule can name the model itself
        module = model.get_submodule(parent)
        inside = [model.get_submodule(n) for n in (*group.sources, *group.sinks) if n.rpartition(".")[0] == parent]
        sizes = {p.size(d) for m in inside for p in m.parameters(recurse=False) for d in range(p.dim())}
        for key, value in vars(module).items():
            if isinstance(value, int) and not isinstance(value, bool) and value and value % group.units == 0:
                if value == group.units or ("head" in key and value not in sizes):
                    heads.setdefault(parent, []).append(key)
                elif value in sizes:
                    widths.setdefault(parent, []).append(key)
    for chosen in (heads, {p: heads.get(p, []) + widths.get(p, []) for p in {*heads, *widths}}, widths):
        styles = {p: f"counts:{','.join(keys)}:units={group.units}" for p, keys in chosen.items() if keys}
        if styles and styles not in found:
            found.append(styles)
    return found
