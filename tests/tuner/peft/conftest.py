"""Says at the end how large the matrix of PEFT's contract was, and what became of it."""

from __future__ import annotations

from adapters import ADAPTERS
from architectures import ARCHITECTURES
from running import RUNNING


def pytest_terminal_summary(terminalreporter):
    counts = {
        outcome: sum("test_contract[" in report.nodeid for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        size = f"{len(ARCHITECTURES)} architectures x {len(ADAPTERS) + len(RUNNING)} behaviours"
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        terminalreporter.write_line(f"PEFT's contract: {size}: {outcomes}")
