"""The progress of a run: one live line in a terminal, elsewhere a plain line every PLAIN_EVERY_S seconds."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0
WINDOW = 20  # steps over which speed and loss are averaged


class Screen:
    """Shows the progress of a run, on one rank.

    Args:
        shown: whether this rank writes.
        tokens: how many tokens a step has.
        console: where to; None is the terminal.
    """

    def __init__(self, shown: bool, tokens: int, console: Console | None = None) -> None:
        self.shown, self.tokens = shown, tokens
        self.console = console or Console()
        self.recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.validation: float | None = None
        self.printed_at = time.monotonic()
        self.bar: Progress | None = None
        if shown and self.console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=10),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Keep the last line; later text follows below it."""
        if self.bar is not None:
            self.bar.stop()

    def line(self, text: str) -> None:
        """Write a line of its own, above the live one."""
        if self.shown:
            self.console.print(text, highlight=False, soft_wrap=True)

    def step(self, record: dict[str, float], total: int | None) -> None:
        """Show a step that is done."""
        if not self.shown:
            return
        self.recent.append(record)
        done = int(record["step"]) + 1
        if "validation_loss" in record:
            self.validation = record["validation_loss"]
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=self.describe(short=True))
            if "validation_loss" in record:
                self.line(f"step {done:5d}  {self.describe()}")
        elif "validation_loss" in record or time.monotonic() - self.printed_at > PLAIN_EVERY_S:
            self.printed_at = time.monotonic()
            self.line(f"step {done:5d}/{total or '?'}  {self.describe()}")

    def describe(self, short: bool = False) -> str:
        """Loss, speed and exposed communication over the last steps; `short` fits beside a bar in 80 columns."""
        seconds = sum(r["seconds"] for r in self.recent)
        loss = sum(r["loss"] for r in self.recent) / len(self.recent)
        share = sum(r["communication"] for r in self.recent) / seconds
        speed = self.tokens * len(self.recent) / seconds
        names = ("val", "tok/s", "comm") if short else ("validation", "tokens/s", "communication")
        validation = f"  {names[0]} {self.validation:.3f}" if self.validation is not None else ""
        return f"loss {loss:.3f}{validation}  {speed:,.0f} {names[1]}  {names[2]} {share:.1%}"
