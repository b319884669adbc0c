"""Which tests run in which process, the audit of skips, and what losslessness tests covered.

Triton chooses between its interpreter and its compiler when a kernel is first imported: a process
runs either ``interpreter`` tests or ``aot`` tests; see CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

_OFFENCES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OFFENCES] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, wrong_mode, needing_gpu = [], [], []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if HERE / "kernels" in item.path.parents and not marks & {"aot", "gpu", "interpreter"}:
            item.add_marker("interpreter")
            marks.add("interpreter")
        if "gpu" in marks:
            needing_gpu.append(item)
        unsuited = marks & ({"aot", "gpu"} if INTERPRETED else {"interpreter"})
        (wrong_mode if unsuited else kept).append(item)
    if wrong_mode:
        config.hook.pytest_deselected(items=wrong_mode)
        items[:] = kept
    if needing_gpu and not _has_gpu():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadgroup`` by `_group`: its own groups are parts of ids, which pytest 9.2 keeps."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByGroup(config, log)


def _group(nodeid: str) -> str:
    """Tests that one worker of pytest-xdist runs: a file's, or a format's where they name one.

    Fixtures load models and decode plainly by file and compression.
    """
    file, _, test = nodeid.partition("::")
    named = re.search(r"\b(fp32|fp16|bf16|int8|nf4)\b", test.partition("[")[2])
    return f"{file} {named[1] if named else ''}"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("gpu") is None:
        _audit(item.config, report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _audit(collector.config, report)
    return report


def _audit(config: pytest.Config, report: pytest.TestReport | pytest.CollectReport) -> None:
    """Note a skip that is neither an expected failure nor explained by absent data."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith("data:"):
        config.stash[_OFFENCES].append(f"{report.nodeid}: {reason}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Take over what a worker of pytest-xdist noted: it has the reports, this process the say."""
    config: pytest.Config = node.config
    config.stash[_OFFENCES] += getattr(node, "workeroutput", {}).get("offences", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    offences = sorted(set(terminalreporter.config.stash[_OFFENCES]))
    if offences:
        terminalreporter.section("skip audit", red=True)
        terminalreporter.line(
            "Only tests marked gpu may skip, and those whose reason starts with 'data:':"
        )
        for offence in offences:
            terminalreporter.line(f"  {offence}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    workeroutput = getattr(session.config, "workeroutput", None)
    if workeroutput is not None:
        workeroutput["offences"] = sorted(set(session.config.stash[_OFFENCES]))
        return
    passing = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if session.config.stash[_OFFENCES] and exitstatus in passing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def lossless(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Record a cell of the losslessness grid for `make test-full`, before comparing its tokens.

    Call it with the axes as strings and the amount as integers, for example ``lossless(
    policy="fixed:4", compression="int8", sampling="greedy", batch="4", sequences=4, tokens=128)``.
    """

    def record(*, sequences: int, tokens: int, **axes: str) -> None:
        cell: dict[str, Any] = {"axes": axes, "sequences": sequences, "tokens": tokens}
        record_property("lossless", json.dumps(cell, sort_keys=True))

    return record
