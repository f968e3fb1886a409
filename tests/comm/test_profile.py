"""The machine's profile: measured once, agreed over the ranks, kept in a file, read by each group when it opens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk
from tpkernels._native import _C
from tpkernels.comm import host, one_shot, profile
from tpkernels.comm.group import Group
from tpkernels.comm.one_shot import Team
from tpkernels.comm.profile import Product, Profile
from tpkernels.testing import run_ranks

SHAPE = Product("float32", 5, 6, 7)
TWO = Profile({Product("float32", 8, 256, 256): {"aten": 2.0, "onednn": 1.0}}, {SHAPE: {"aten": 1.0, "onednn": 2.0}})


def chosen(group: Group, product: Product) -> tuple[str, str]:
    return _C.choose_engine(group._communicator, *product)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where profiles are kept; they are read and measured as users have it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TPKERNELS_PROFILE")
    return tmp_path


@pytest.fixture
def onednn() -> Iterator[None]:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs a torch with oneDNN")
    yield


# Run by processes of their own, which change them for themselves alone.
def _open_first(folder: str, mode: str) -> tuple[str, tuple[str, str], list[str]]:
    """Open a group with two points to measure; the file, an engine and its reason, and the files there are."""
    _open_first_settings(folder, mode)
    with Group.open(dist.group.WORLD) as group:
        text = profile.profile_file(group.transport).read_text() if mode == "auto" else ""
        return text, chosen(group, Product("float32", 9, 70, 60)), sorted(os.listdir(folder))


def _open_first_settings(folder: str, mode: str = "auto", nbytes: list[int | None] | None = None) -> None:
    """Two points to measure, on a machine with enough cores; bytes of one shot are not measured but these, or 1,024."""
    profile.measure_one_shot = lambda communicator: 1024 if nbytes is None else nbytes.pop()
    os.environ["XDG_CACHE_HOME"], os.environ["TPKERNELS_PROFILE"] = folder, mode
    products = [Product("float32", 8, 64, 64), Product("bfloat16", 2, 64, 64)]
    profile.points = lambda: iter(products)
    kept = host.RankInfo.here
    host.RankInfo.here = lambda *args: replace(kept(*args), cores=frozenset(range(8)))  # a machine with enough cores


def test_the_first_group_of_a_machine_measures_its_profile(tmp_path: Path, onednn: None) -> None:
    results = run_ranks(_open_first, 2, str(tmp_path), "auto", fresh=True)
    assert results[0] == results[1]
    text, (engine, why), _ = results[0]
    points = Profile.parse(text).points
    assert [product.M for product in points] == [8, 2]
    us = points[Product("float32", 8, 64, 64)]
    assert {"aten", "onednn"} <= us.keys() and all(time > 0 for time in us.values())
    assert engine == min(us, key=lambda name: us[name] if name != "gemv" else 1e9)  # nine rows are too many for gemv
    assert why.startswith("about ") and why.endswith(", from 8x64x64")
    again = run_ranks(_open_first, 2, str(tmp_path), "auto", fresh=True)
    assert again == results  # read, not measured: other times would differ


def test_nothing_is_measured_or_read_where_it_is_switched_off(tmp_path: Path) -> None:
    _, (_, why), files = run_ranks(_open_first, 2, str(tmp_path), "off", fresh=True)[0]
    assert "rule" in why and files == []


def test_ranks_that_share_cores_measure_nothing(folder: Path) -> None:
    threads = torch.get_num_threads()
    assert profile._can_measure(3 * threads, 3, "shm")
    assert not profile._can_measure(3 * threads - 1, 3, "shm")


def _open_with_file(folder: str, text: str, differs: bool) -> tuple[str, str]:
    path = Path(folder) / f"{dist.get_rank() if differs else 0}.json"
    path.write_text(text if dist.get_rank() == 0 or not differs else Profile().text())
    os.environ["TPKERNELS_PROFILE"] = str(path)
    dist.barrier()
    with Group.open(dist.group.WORLD) as group:
        return chosen(group, SHAPE)


def test_ranks_with_different_profiles_use_none(folder: Path) -> None:
    same, different = (
        run_ranks(_open_with_file, 2, str(folder), TWO.text(), differs, fresh=True) for differs in (False, True)
    )
    assert [why for _, why in same] == ["measured at 5x6x7: aten 1 us, onednn 2 us"] * 2
    assert different[0] == different[1] and "rule" in different[0][1]


def test_a_shape_of_its_own_goes_before_the_nearest_point(folder: Path, onednn: None) -> None:
    profile.write(TWO, "local")
    with Group.open() as group:
        assert chosen(group, SHAPE) == ("aten", "measured at 5x6x7: aten 1 us, onednn 2 us")
        assert chosen(group, Product("float32", 16, 300, 200)) == (
            "onednn",
            "about 1.8 us by onednn, 3.7 us by aten, from 8x256x256",
        )
        assert "measured" not in chosen(group, Product("bfloat16", 16, 300, 200))[1]


def test_the_nearest_point_is_that_of_the_least_ratios(folder: Path) -> None:
    sizes = [(1, 64, 64), (4, 64, 64), (1, 1024, 64), (1, 64, 1024)]
    points = {Product("float32", *size): {"aten": float(i + 1)} for i, size in enumerate(sizes)}
    with Group.open() as group:
        Profile(points).give(group._communicator)
        for asked, nearest in [
            ((1, 64, 64), 0), ((2, 64, 64), 0), ((3, 64, 64), 1), ((2, 700, 64), 2), ((2, 100, 900), 3),
            ((99, 9, 9), 1),
        ]:  # fmt: skip
            M, N, K = sizes[nearest]
            why = chosen(group, Product("float32", *asked))[1]
            assert why.endswith(f" us by aten, from {M}x{N}x{K}") or why == "measured at 1x64x64: aten 1 us", why


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"points": []}',
        '{"points": [[1, 2]], "shapes": []}',
        '{"points": [], "shapes": 3}',
        *(
            f'{{"points": [], "shapes": [[{row}]]}}'
            for row in (
                '"int8", 5, 6, 7, {"aten": 1}',
                '"float32", 0, 6, 7, {"aten": 1}',
                '"float32", 5, 6, {"aten": 1}',
                '"float32", 5, 6, 7, {"mkl": 1}',
                '"float32", 5, 6, 7, {"aten": NaN}',
                '"float32", 5, 6, 7, {"aten": -1}',
                '"float32", 5, 6, 7, {}',
                '"float32", 5, 6, 7, 1',
                '"float32", 5.5, 6, 7, {"aten": 1}',
            )
        ),
        *(f'{{"points": [], "shapes": [], "one_shot": [{row}]}}' for row in ("[2, 2]", "[2, 2, 32769]", "[2, 2.0, 9]")),
    ],
)
def test_a_damaged_file_counts_as_none_and_is_refused_where_it_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    profile.profile_file("local").parent.mkdir(parents=True)
    profile.profile_file("local").write_text(text)
    with Group.open() as group:
        assert "measured" not in chosen(group, SHAPE)[1]
    monkeypatch.setenv("TPKERNELS_PROFILE", str(profile.profile_file("local")))
    with pytest.raises(ValueError, match="TPKERNELS_PROFILE: expected auto, off, or the path of a profile, got"):
        Group.open()


def test_a_profile_is_read_as_it_was_written() -> None:
    assert Profile.parse(TWO.text()) == TWO and Profile.parse(Profile().text()) == Profile()
    one = Profile(one_shot={Team(2, 2): 512, Team(4, 2): 8192})
    assert Profile.parse(one.text()) == one


def test_points_lie_in_all_sizes_and_have_several_engines() -> None:
    points = list(profile.points())
    assert len(set(points)) == len(points)
    assert all(len(_C.engines_for(*point)) > 1 for point in points)
    assert {(p.N, p.K) for p in points} == {(n, k) for n in profile._SIZES for k in profile._SIZES}


def _tuned(folder: str) -> tuple[dict[str, float], str, Profile]:
    os.environ["XDG_CACHE_HOME"] = folder
    os.environ["TPKERNELS_PROFILE"] = "auto"
    profile.points = lambda: iter([])
    with Group.open(dist.group.WORLD) as group:
        explained = group.explain("gemm_all_reduce", M=32, N=24, K=16, dtype=torch.float32, tune=True)
        engine = chosen(group, Product("float32", 32, 24, 16))[0]
        return explained.measured, engine, Profile.parse(profile.profile_file(group.transport).read_text())


def test_ranks_agree_on_the_engine_that_was_measured_faster_and_keep_it(tmp_path: Path, onednn: None) -> None:
    results = run_ranks(_tuned, 2, str(tmp_path), fresh=True)
    us, engine, kept = results[0]
    assert results[1] == results[0]
    assert set(us) == {"aten", "onednn"} and all(time > 0 for time in us.values())
    assert engine == min(us, key=lambda name: us[name])
    assert kept.shapes == {Product("float32", 32, 24, 16): us}


def test_nothing_is_measured_unless_asked() -> None:
    with Group.open() as group:
        assert group.explain("gemm_all_reduce", M=8, N=8, K=8, dtype=torch.float32).measured == {}


def test_tuning_one_group_changes_no_engine_and_no_bit_of_another(folder: Path) -> None:
    M, N, K = 9, 130, 515
    forward = Product("float32", M, N, K)
    x, w = torch.randn(M, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    with Group.open() as first, Group.open() as second:

        def results(group: Group) -> list[torch.Tensor]:
            y = tpk.ops.gemm_all_reduce(x, w, group=group)
            return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))]

        bits, rule = results(first), chosen(first, forward)
        for engine in _C.engines_for(*forward):  # one of them is not the rule's
            for product in (forward, Product("float32", M, K, N)):  # forward, gradient of x
                second._communicator.add_measured(*product, {engine: 1.0})
            assert chosen(second, forward)[0] == engine
            results(second)
            assert chosen(first, forward) == rule
            assert all(map(torch.equal, results(first), bits))
        second.explain("gemm_all_reduce", M=M, N=N, K=K, tune=True)
        assert "measured" in chosen(second, forward)[1]
        assert chosen(first, forward) == rule and all(map(torch.equal, results(first), bits))
    assert json.loads(profile.profile_file("local").read_text())["shapes"][0][:4] == list(forward)


@pytest.mark.parametrize("given", [False, True])
def test_tuning_keeps_nothing_where_the_profile_is_switched_off_or_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    file = folder / "given.json"
    file.write_text(TWO.text())
    monkeypatch.setenv("TPKERNELS_PROFILE", str(file) if given else "off")
    with Group.open() as group:
        assert group.explain("gemm_all_reduce", M=2, N=24, K=16, dtype=torch.bfloat16, tune=True).measured
        assert "measured at 2x24x16" in group.explain("gemm_all_reduce", M=2, N=24, K=16, dtype=torch.bfloat16).reason
    assert file.read_text() == TWO.text() and os.listdir(folder) == ["given.json"]


def _open_with_a_bad_file_on_rank_1(missing: str) -> str:
    if dist.get_rank() == 1:
        os.environ["TPKERNELS_PROFILE"] = missing
    try:
        Group.open(dist.group.WORLD, timeout_s=60.0)
    except (ValueError, tpk.PeerLostError) as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def test_a_rank_that_cannot_read_its_profile_is_not_waited_for(tmp_path: Path) -> None:
    first, second = run_ranks(_open_with_a_bad_file_on_rank_1, 2, str(tmp_path / "none.json"), timeout=50.0, fresh=True)
    assert first.startswith("PeerLostError: ") and "rank 1" in first
    assert second.startswith("ValueError: TPKERNELS_PROFILE: expected auto, off, or the path of a profile, got ")


def _shots(folder: str, texts: list[str], nbytes: list[int | None] | None = None) -> tuple[list[str], str]:
    """The paths of sums of 512, 4,096 and 8,192 bytes, which the counters show, and what the profile has afterwards."""
    _open_first_settings(folder, nbytes=nbytes)
    if texts:
        path = Path(folder) / f"{dist.get_rank()}.json"
        path.write_text(texts[dist.get_rank() % len(texts)])
        os.environ["TPKERNELS_PROFILE"] = str(path)
    dist.barrier()
    paths = []
    with Group.open(dist.group.WORLD, transport="shm") as group:
        for numel in (128, 1024, 2048):
            explained = group.explain("all_reduce_", numel=numel)
            tpk.ops.all_reduce_(torch.ones(numel), group=group)
            sent = group.stats()["by_op"]["all_reduce_"]["wire_bytes"]
            group.reset_stats()
            assert explained.path == ("one_shot" if sent == (group.world_size - 1) * numel * 4 else "two_shot")
            paths.append(f"{explained.path}{', as measured' * (', as measured' in explained.reason)}")
        text = profile.profile_file("shm").read_text() if not texts else ""
    return paths, text


@pytest.mark.parametrize(
    ("team", "nbytes", "expected"),
    [
        (Team(3, 3), 4096, ["one_shot, as measured", "one_shot, as measured", "two_shot, as measured"]),
        (Team(3, 3), 0, ["two_shot, as measured"] * 3),
        (Team(2, 2), 4096, ["one_shot", "two_shot", "two_shot"]),  # of other ranks: the rule
    ],
)
def test_the_profile_says_what_every_rank_sums(tmp_path: Path, team: Team, nbytes: int, expected: list[str]) -> None:
    text = Profile(TWO.points, one_shot={team: nbytes}).text()
    for paths, _ in run_ranks(_shots, 3, str(tmp_path), [text], fresh=True):
        assert paths == expected


def test_ranks_with_different_profiles_sum_by_the_rule(tmp_path: Path) -> None:
    texts = [Profile(TWO.points, one_shot={Team(3, 3): nbytes}).text() for nbytes in (0, 8192, 8192)]
    for paths, _ in run_ranks(_shots, 3, str(tmp_path), texts, fresh=True):
        assert paths == ["one_shot", "two_shot", "two_shot"]


def _measured_shots(folder: str, nbytes: int | None) -> tuple[list[str], str]:
    """The same where measuring gives this number, in two groups, the second of which only reads."""
    first = _shots(folder, [], [nbytes])
    assert _shots(folder, [], [None] * (nbytes is None)) == first
    return first


@pytest.mark.parametrize("nbytes", [4096, None])
def test_what_a_group_measures_is_kept_for_its_number_of_ranks(tmp_path: Path, nbytes: int | None) -> None:
    results = run_ranks(_measured_shots, 3, str(tmp_path), nbytes, fresh=True)
    assert results[0] == results[1] == results[2]
    paths, text = results[0]
    kept = Profile.parse(text)
    assert kept.one_shot == ({} if nbytes is None else {Team(3, 3): nbytes}) and len(kept.points) == 2
    assert paths[1] == ("two_shot" if nbytes is None else "one_shot, as measured")


def _measured_one_shot() -> tuple[list[int | None], bool]:
    with Group.open(dist.group.WORLD, transport="shm") as group:
        found = [one_shot.measure_one_shot(group._communicator)]
        one_shot._SECONDS = 0.0
        found.append(one_shot.measure_one_shot(group._communicator))
        return found, "as measured" in group.explain("all_reduce", numel=1).reason


def test_ranks_measure_alike_and_nothing_where_times_do_not_repeat() -> None:
    results = run_ranks(_measured_one_shot, 2, fresh=True)
    assert results[0] == results[1]
    (found, late), as_measured = results[0]
    assert found in (None, 0, *one_shot._SIZES) and late is None and not as_measured


def test_ranks_that_share_cores_are_a_team_of_their_own() -> None:
    with Group.open() as group:
        assert Team.of(group._communicator, 8) == Team(1, 1)
        group._communicator.set_one_shot(one_shot._SIZES[-1])
        with pytest.raises(ValueError, match="set_one_shot: expected 32768 bytes at most, got 32769"):
            group._communicator.set_one_shot(one_shot._SIZES[-1] + 1)


def _open_where_nothing_can_be_written(folder: str, transport: str) -> tuple[str, bool]:
    """Open the first group of a machine whose disk is full, where new tensors are on the meta device."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    profile.write = full
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    _open_first_settings(folder)
    with Group.open(dist.group.WORLD, transport=transport) as group:
        return chosen(group, Product("bfloat16", 2, 64, 64))[1], group.stats()["calls"] == 0


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_a_group_opens_with_what_it_measured_where_that_cannot_be_kept(tmp_path: Path, transport: str) -> None:
    for why, no_calls in run_ranks(_open_where_nothing_can_be_written, 2, str(tmp_path), transport, fresh=True):
        assert "measured at 2x64x64" in why and no_calls
