"""Add up JUnit reports, and fail when fewer tests passed than must have: tests that silently vanish are noticed.

Usage: python scripts/count_tests.py REPORT.xml=FLOOR ...
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET


def count(report: str) -> tuple[int, int]:
    """Passed and failed test cases of a report; skipped ones are neither."""
    cases = list(ET.parse(report).iter("testcase"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases) - failed - skipped, failed


def main(arguments: list[str]) -> int:
    """Print a line for each report that falls short, then the total."""
    passed = failed = short = 0
    for argument in arguments:
        report, _, floor = argument.rpartition("=")
        ok, bad = count(report)
        passed, failed = passed + ok, failed + bad
        if ok < int(floor):
            print(f"count_tests: {report} has {ok} passed tests, there must be {floor} or more")
            short += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
