"""The real CUDA module, compiled by nvcc and loaded, also where torch has no CUDA: then libtorch_cuda.so is a stub.

It is built by `make cuda`, incrementally, for one architecture; for all of them once a week. No GPU is needed; nothing
here runs a kernel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu_steps import BUILD_LIGHT, LIGHT  # noqa: E402

from tests.harness.cuda_build import ARCH, BUILD, HOPPER, OBSTACLE, build, nvcc_release, object_of, ptx_of  # noqa: E402
from tests.harness.ranks import weekly  # noqa: E402

OTHER_ARCHS = ("80", "100a")

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE)),
]


def op_names() -> list[str]:
    return re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/torch_side/schemas.cpp").read_text())


def kernel_files() -> list[str]:
    return sorted(path.name for path in (ROOT / "csrc/cuda/kernels").glob("*.cu") if path.name != HOPPER)


# Ops whose arguments have no tensor: nothing to dispatch on, so each backend has one of its own.
WITHOUT_TENSOR = {"arena_empty", "device_arena_empty", "exchange_sizes"}

PROGRAM = """
import importlib.util, json, sys, torch
import tpkernels
spec = importlib.util.spec_from_file_location("tpkernels._C_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.set_error_types(tpkernels.RankMismatchError, tpkernels.PeerLostError)

def argument(type_):
    known = {
        "Tensor": torch.ones(2, 2), "Optional[Tensor]": None, "List[Tensor]": [torch.ones(2, 2)], "str": "none",
        "int": 1, "SymInt": 1, "float": 0.5, "bool": True, "List[int]": [2], "List[SymInt]": [2],
        "number": 1, "ScalarType": torch.float32, "Device": torch.device("cuda:0"),
    }
    return known[str(type_)]

def error(call, *arguments):
    try:
        call(*arguments)
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""

found = {}
for name in sys.argv[2:]:
    op = getattr(torch.ops.tpkernels, name).default
    has = lambda key: torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)
    arguments = [torch.float32 if a.name == "dtype" else argument(a.type) for a in op._schema.arguments]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    found[name] = {
        "cpu": has("CPU"), "cuda": has("CUDA"), "anywhere": has("CompositeExplicitAutograd"),
        "call": error(op._handle.redispatch_boxed, cuda, *arguments) if has("CUDA") else "",
    }
closed = error(torch.ops.tpkernels.device_arena_empty, "nobody", [2], torch.float32, torch.device("cuda:0"))
opened = error(module.open_local, "name", "label", 0)
print(json.dumps({"ops": found, "limits": module.limits(), "closed": closed, "opened": opened}))
"""


@pytest.fixture(scope="module", params=[ARCH, *weekly(" ".join((ARCH, *OTHER_ARCHS)))])
def archs(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The architectures that the module is compiled for."""
    return tuple(request.param.split())


@pytest.fixture(scope="module")
def built(archs: tuple[str, ...]) -> Path:
    return build("" if len(archs) > 1 else archs[0])


@pytest.fixture(scope="module")
def loaded(built: Path) -> dict[str, Any]:
    """What a process finds that has loaded the CPU module and this one."""
    environment = dict(os.environ)
    if (BUILD / "stub").is_dir() and torch.version.cuda is None:
        environment["LD_LIBRARY_PATH"] = str(BUILD / "stub")
    command = [sys.executable, "-c", PROGRAM, str(built), *op_names()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", op_names())
def test_every_op_has_a_kernel_for_cuda_as_it_has_for_the_cpu(loaded: dict[str, Any], name: str) -> None:
    op = loaded["ops"][name]
    if name in WITHOUT_TENSOR:
        assert op["anywhere"] and not op["cuda"] and not op["cpu"]
    else:
        assert op["cpu"] and op["cuda"] and not op["anywhere"]


@pytest.mark.parametrize("name", sorted(set(op_names()) - WITHOUT_TENSOR))
def test_every_cuda_kernel_takes_what_its_schema_says(loaded: dict[str, Any], name: str) -> None:
    # torch compares the two only when a kernel is called. The call unpacks its arguments and then asks for the device
    # of a CPU tensor, which has none (or for that of a machine without a driver).
    said = loaded["ops"][name]["call"]
    assert said and "Registered schema has" not in said
    assert re.search(r"cudaGetDevice|cudaSetDevice|aoti_torch_get_current_cuda_stream", said), said


def test_the_cuda_module_raises_the_types_of_the_package(loaded: dict[str, Any]) -> None:
    assert loaded["closed"].startswith("PeerLostError: group.empty: group 'nobody' is not open"), loaded["closed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: with one, opening works")
def test_a_group_on_a_machine_without_a_gpu_is_an_error_that_names_the_call(loaded: dict[str, Any]) -> None:
    assert re.match(r"RuntimeError: cuda\w+\(.*\) failed: .*\(cudaError\w+\)", loaded["opened"]), loaded["opened"]


def test_the_limits_are_those_of_the_headers(loaded: dict[str, Any]) -> None:
    header = (ROOT / "csrc/cuda/kernels/peer_limits.h").read_text()
    assert f"kMaxPeers = {loaded['limits']['max_peers']};" in header
    assert f"kMaxBlocks = {loaded['limits']['max_blocks']};" in header


def test_the_module_asks_torch_for_stable_symbols_alone(built: Path) -> None:
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(built)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch|4c10d)", name)] == []
    assert any(name.startswith("aoti_torch_") for name in names)


def test_the_module_carries_the_cuda_runtime_in_itself(built: Path) -> None:
    needed = subprocess.run(["readelf", "-d", str(built)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cuda.so" in needed and "libtorch_cpu.so" in needed
    assert "libcudart" not in needed and "libtorch_python" not in needed and "RUNPATH" not in needed


# ---- what ptxas says -------------------------------------------------------------------------------------------------


def spills_of(report: str) -> list[tuple[str, ...]]:
    return re.findall(r"\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)


@pytest.mark.parametrize("file", kernel_files())
def test_no_kernel_spills_and_none_is_slowed_down_by_the_compiler(
    built: Path, archs: tuple[str, ...], file: str
) -> None:
    report = Path(f"{object_of(file)}.ptxas").read_text()
    kernels = re.findall(r"Compiling entry function '\w+' for 'sm_(\w+)'", report)
    counts = {arch: kernels.count(arch) for arch in archs}
    assert set(kernels) == set(archs) and len(set(counts.values())) == 1, f"not the same for every arch: {counts}"
    spills = spills_of(report)
    assert len(spills) >= len(kernels) and set(spills) == {("0", "0")}, spills
    assert not re.search(r"warning|C75(08|10)|Potential Performance Loss", report)


# C7508 and C7510: products that wait for each other, because the compiler could not tell that they need not.
def test_the_products_of_hopper_neither_spill_nor_wait_for_each_other(built: Path) -> None:
    report = Path(f"{object_of(HOPPER)}.ptxas").read_text()
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\w+)'", report)
    assert {arch for _, arch in kernels} == {"sm_90a"} and len(kernels) == 22, kernels
    assert set(spills_of(report)) == {("0", "0")}, report
    assert not re.search(r"warning|C75(08|10)|Potential Performance Loss", report)
    # All registers of a multiprocessor, dealt anew to the warpgroups (setmaxnreg).
    assert set(re.findall(r"Used (\d+) registers", report)) == {"168"}, report


# Small files stand for all of them here: what differs between architectures is in device.cuh.
@pytest.mark.parametrize("arch", OTHER_ARCHS)
@pytest.mark.parametrize("file", ["exchange_marks.cu", "vocab.cu"])
def test_kernels_are_compiled_for_other_architectures_without_spills(tmp_path: Path, file: str, arch: str) -> None:
    if arch == "100a" and float(nvcc_release() or 0) < 12.8:
        pytest.skip("sm_100a needs nvcc 12.8")
    command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", "-Icsrc"]
    command += ["-cubin", "-o", str(tmp_path / "cubin"), f"csrc/cuda/kernels/{file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(spills_of(done.stderr)) == {("0", "0")}, done.stderr


# ---- what nvcc makes of single primitives ----------------------------------------------------------------------------


def ptx(file: str, kernel: str) -> str:
    """The first kernel whose name has this in it."""
    kernels = ptx_of(file).split(".entry ")[1:]
    return next(one for one in kernels if kernel in one.partition("(")[0])


def test_an_announcement_is_two_stores_and_a_flag() -> None:
    stores = re.findall(r"st\.(?:relaxed|release)\.sys\.global\.(?:v4\.)?u32", ptx("move.cu", "barrier_kernel"))
    assert stores[:3] == ["st.relaxed.sys.global.v4.u32"] * 2 + ["st.release.sys.global.u32"], stores


def test_halves_are_converted_by_instructions() -> None:
    # The codec fp16 of floats, which converts and moves and does nothing else: 16 values a lane.
    encode, decode = (ptx("codec.cu", f"{name}_kernelINS0_5CodedINS_9Fp16CodecEfEE") for name in ("encode", "decode"))
    assert encode.count("cvt.rn.f16.f32") >= 16
    assert decode.count("cvt.f32.f16") >= 16


@pytest.mark.parametrize("kernel", ["one_shot_kernel", "two_shot_kernel"])
def test_two_ranks_are_summed_with_eight_loads_in_flight(kernel: str) -> None:
    text = ptx("all_reduce.cu", f"{kernel}INS0_5PlainINS_8Bfloat16")
    accesses = re.findall(r"ld\.relaxed\.sys\.global\.v4|st\.global\.v4", text)
    runs = "".join("L" if one.startswith("ld") else "S" for one in accesses)
    assert max(map(len, re.findall("L+", runs))) >= 8, runs


def test_a_binary_of_every_primitive_alone_compiles_and_its_host_half_runs() -> None:
    (ROOT / "build").mkdir(exist_ok=True)
    done = subprocess.run(BUILD_LIGHT, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([f"./{LIGHT}", "--dry"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "13 checks, the host's half of them holds" in done.stdout


def test_a_spill_in_a_report_is_noticed() -> None:
    assert spills_of("    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads") == [("4", "0")]
