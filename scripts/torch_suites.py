"""Run torch's own distributed tests, as the installed wheel has them, for several back ends, and compare.

    python scripts/torch_suites.py                        # all that run without a GPU, on 2 ranks: two minutes
    python scripts/torch_suites.py -k all_reduce -R 4     # those whose name contains a text, on 4 ranks
    python scripts/torch_suites.py --file ~/pytorch/test/distributed/tensor/parallel/test_tp_style.py

torch/testing/_internal/distributed/distributed_test.py takes its back end by name and runs unmodified. Many tests ask
for that name to decide what is supported, so tpk has two columns: as it is, and in the place of gloo, under its name.
Exit code 1 when a test that gloo passes fails in another column.

It is the only file of tests in the wheel. Others (FSDP2, DTensor) are in torch's repository; --file runs one of them,
which must be of the installed version. They ask for gloo on the CPU: tpk takes its place.

Processes are forked from one that has imported torch, and ranks from those: 0.5 s a test instead of 2.4 s.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import sys
import time
import traceback
import unittest
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tpkernels.testing.spawn import fork_server
from tpkernels.testing.worker import die_with_parent

OUT = Path(__file__).resolve().parent.parent / "build" / "torch-suites"
REFERENCE = "gloo"
AS_REFERENCE = f"-as-{REFERENCE}"
AS_TPK = f"tpk{AS_REFERENCE}"
COLUMNS = f"tpk,{AS_TPK}"
LIMIT_S = 100  # of one test

# Tests that gloo passes and no other back end can, and why.
EXPLAINED = {
    "test_ddp_logging_data_cpu": "torch writes 'custom' for the name of every registered back end into the log of DDP",
}
OWN_EVENT = re.compile(r"'tpk:(\w+)' != 'gloo:\1'")


def explained(result: Result) -> str | None:
    """Why no other back end than gloo passes, where that is known."""
    if OWN_EVENT.search(result.detail):
        return "the events of a profiler have the name of the back end"
    return EXPLAINED.get(result.test)


@dataclass(frozen=True)
class Column:
    """One way to run the tests.

    Attributes:
        backend: what carries out the collectives.
        as_gloo: it does so where gloo is asked for.
        world_size: how many ranks a test of distributed_test.py has.
        file: of other tests, None for distributed_test.py.
    """

    backend: str
    as_gloo: bool
    world_size: int
    file: Path | None

    @classmethod
    def parse(cls, text: str, world_size: int, file: Path | None) -> Column:
        """Of "tpk" or "tpk-as-gloo"."""
        return cls(text.removesuffix(AS_REFERENCE), text.endswith(AS_REFERENCE), world_size, file)

    @property
    def name(self) -> str:
        """That tests give to `init_process_group`."""
        return REFERENCE if self.as_gloo else self.backend


@dataclass(frozen=True)
class Result:
    """How a test went. outcome: passed, failed, skipped; detail: the error or the reason; seconds: it took."""

    test: str
    outcome: str
    detail: str
    seconds: float


def load(column: Column) -> unittest.TestSuite:
    """The tests of a column, in a process that has not imported torch's testing before."""
    import tempfile

    folder = tempfile.mkdtemp(prefix="torch-suites-")  # of this process; every test has another one inside it
    tempfile.tempdir = folder
    os.environ.update(WORLD_SIZE=str(column.world_size), TEMP_DIR=folder, BACKEND=column.name)
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1")
    os.environ.update(DISTRIBUTED_TESTS_DEFAULT_TIMEOUT=str(LIMIT_S))
    import torch
    import torch.distributed as dist

    if not dist.is_backend_available(column.backend):
        raise ValueError(f"torch.distributed has no back end {column.backend!r}")
    if column.as_gloo:
        _put_in_the_place_of_gloo(column.backend)
    die_with_parent()
    torch.set_num_threads(1)
    fork = torch.multiprocessing.get_context("fork")
    torch.multiprocessing.get_context = lambda method=None: fork
    return _of_file(column.file) if column.file else _of_the_wheel(column)


def _of_the_wheel(column: Column) -> unittest.TestSuite:
    import torch
    from torch.testing._internal.distributed import distributed_test as suite

    found = suite.get_profiling_event
    own, other = f"{column.name}:", f"{column.backend}:"  # how names of events begin
    suite.get_profiling_event = lambda name, *rest, **options: found(name.replace(own, other), *rest, **options)

    class Forked(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore[misc,name-defined]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context().Process)

        @classmethod
        def _run(cls, *arguments: Any, **options: Any) -> None:
            die_with_parent()
            super()._run(*arguments, **options)

    return unittest.TestLoader().loadTestsFromTestCase(Forked)


def _of_file(file: Path) -> unittest.TestSuite:
    sys.path.insert(0, str(file.parent))  # of what it shares with its neighbours
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return unittest.TestLoader().loadTestsFromModule(module)


def _put_in_the_place_of_gloo(backend: str) -> None:
    """Let torch open this back end under the name of gloo."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import Backend

    create = dist.Backend._plugins[backend.upper()].creator_fn

    class Kind(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, Backend)

    class Substitute(metaclass=Kind):
        def __new__(cls, store: Any, rank: int, size: int, timeout: Any) -> Any:
            options: Any = dist.distributed_c10d._DistributedBackendOptions()
            options.store, options.group_rank, options.group_size, options.timeout = store, rank, size, timeout
            options.group_id = "in place of gloo"
            return create(options, None)

    dist.distributed_c10d.ProcessGroupGloo = Substitute


def _cases(suite: Any) -> Iterator[unittest.TestCase]:
    for part in suite:
        yield from _cases(part) if isinstance(part, unittest.TestSuite) else (part,)


_tests: dict[str, unittest.TestCase]  # of this process, by name


def _open(column: Column, log: Path) -> None:
    """Begin a process that runs tests: what they print goes to a file."""
    global _tests
    file = os.open(f"{log}-{os.getpid()}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    logging.basicConfig(level=logging.ERROR)
    try:
        found = list(_cases(load(column)))
    except BaseException:
        traceback.print_exc()
        raise
    named = {f"{type(case).__name__}.{case._testMethodName}": case for case in found}
    _tests = named if column.file else {name.partition(".")[2]: case for name, case in named.items()}


def _names() -> list[str]:
    return list(_tests)


def _run(name: str) -> Result:
    print(f"==== {name}", flush=True)
    start, found = time.monotonic(), unittest.TestResult()
    unittest.TestSuite([_tests[name]]).run(found)
    outcome, detail = "passed", ""
    if found.skipped:
        outcome, detail = "skipped", found.skipped[0][1]
    if found.errors or found.failures:
        outcome, detail = "failed", (found.errors + found.failures)[0][1]
    return Result(name, outcome, detail, round(time.monotonic() - start, 2))


def run(column: Column, filters: Sequence[str], jobs: int, log: Path) -> Iterator[Result]:
    """Run a column's tests, as many side by side as `jobs`; the results as they come."""
    for old in log.parent.glob(f"{log.name}-*.log"):
        old.unlink()
    with ProcessPoolExecutor(jobs, fork_server(), functools.partial(_open, column, log)) as pool:
        names = pool.submit(_names).result()
        chosen = [name for name in names if not filters or any(text in name for text in filters)]
        waiting: dict[Future[Result], str] = {pool.submit(_run, name): name for name in chosen}
        for future in as_completed(waiting):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Result(waiting[future], "failed", f"the process that ran it died: {log}-*.log", 0.0)


def worse(results: dict[str, dict[str, Result]], outcome: str) -> Iterator[tuple[str, Result]]:
    """(column, result) of the tests that the reference passes and another column has this outcome for."""
    passed = {name for name, result in results[REFERENCE].items() if result.outcome == "passed"}
    for title, column in results.items():
        for name in sorted(passed & column.keys()):
            if column[name].outcome == outcome:
                yield title, column[name]


def table(results: dict[str, dict[str, Result]]) -> str:
    """Passed, failed and skipped of each column."""
    lines = [f"{'':24}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}"]
    for title, column in results.items():
        count = Counter(result.outcome for result in column.values())
        took = sum(result.seconds for result in column.values())
        lines.append(f"{title:24}{count['passed']:8}{count['failed']:8}{count['skipped']:8}{took:9.0f}")
    return "\n".join(lines)


def reason(text: str) -> str:
    """The line of an error that says what it is: of the first rank that reported one."""
    _, _, ours = text.partition("and exception:\n")
    lines = [line.strip() for line in (ours.split("\nProcess ")[0] or text).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Skip)\b", line)]
    return (named or lines or [""])[-1][:240]


def main(
    k: Annotated[list[str] | None, typer.Option("-k", help="Tests whose name contains this; may be repeated.")] = None,
    columns: Annotated[str, typer.Option(help="Back ends, separated by commas.")] = COLUMNS,
    world_size: Annotated[int, typer.Option("-R", "--world-size", help="Ranks of a test.")] = 2,
    jobs: Annotated[int, typer.Option("-j", help="Tests that run side by side.")] = 2,
    passes: Annotated[int, typer.Option(help="Fewer passed tests in any column are a failure.")] = 1,
    file: Annotated[Path | None, typer.Option(help="Other tests: a file of torch's repository.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results and what the tests print.")] = OUT,
) -> None:
    """Run torch's distributed tests for gloo and other back ends and compare."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Result]] = {}
    titles = [AS_TPK] if file and columns == COLUMNS else columns.split(",")
    for title in dict.fromkeys([REFERENCE, *titles]):
        log = out / f"{title}-{file.stem if file else world_size}"
        column = Column.parse(title, world_size, file)
        found = {result.test: result for result in run(column, k or (), jobs, log)}
        results[title] = dict(sorted(found.items()))
        log.with_name(f"{log.name}.json").write_text(json.dumps([asdict(r) for r in found.values()], indent=1))
        for result in found.values():
            if result.outcome == "failed":
                print(f"{title}: {result.test} failed: {reason(result.detail)}", flush=True)
    print(table(results))
    for title, result in worse(results, "skipped"):
        print(f"{title}: {result.test} skipped: {result.detail}")
    bad = list(worse(results, "failed"))
    for title, result in bad:
        print(f"{REFERENCE} passes, {title} fails: {result.test} ({explained(result) or 'not explained'})")
    few = [title for title, column in results.items() if sum(r.outcome == "passed" for r in column.values()) < passes]
    for title in few:
        print(f"{title}: fewer than {passes} passed")
    sys.exit(1 if few or any(explained(result) is None for _, result in bad) else 0)


if __name__ == "__main__":
    typer.run(main)
