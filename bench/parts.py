"""The parts of the GPU command and their sections, those first that matter most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from bench import (
    audit,
    decoder_rows,
    e2e_rows,
    kernel_rows,
    linear_rows,
    loop_rows,
    pair_rows,
    roofline,
    shares,
    suites,
)
from bench.lab import Lab, Row
from bench.running import Section

_RACES = ("tests/gpu/test_draft_step_gpu.py", "tests/gpu/test_verify_gpu.py")
_DECODER_RACES = ("tests/gpu/test_decoder_races_gpu.py",)


def _loop_models(lab: Lab, rows: Callable[..., Iterator[Row]]) -> Iterator[Row]:
    """Rows of a pair that costs little to draft with: a model, and its first layer."""
    name = "tiny" if lab.dry else "Llama-3.2-1B"
    target = e2e_rows.random_decoder(lab, name, "bf16")
    names = {"target": name, "draft": "its first layer"}
    yield from rows(lab, target, target.first_layers(1), names)


def _loops(rows: Callable[..., Iterator[Row]]) -> Callable[[Lab], Iterator[Row]]:
    return partial(_loop_models, rows=rows)


def _linear(model: str) -> Callable[[Lab], Iterator[Row]]:
    return partial(linear_rows.linear_rows, model=model)


def _forward(model: str) -> Callable[[Lab], Iterator[Row]]:
    return partial(roofline.forward_rows, model=model)


def _pairs(target: str) -> Callable[[Lab], Iterator[Row]]:
    return partial(e2e_rows.e2e_rows, target=target)


def _tests(files: Mapping[str, str], quick: float) -> Section:
    return Section("tests", partial(suites.test_rows, files=files), quick=quick)


PARTS: dict[str, tuple[Section, ...]] = {
    "probe": (Section("probe", suites.probe_rows, quick=16),),
    "draft": (Section("draft", kernel_rows.draft_rows, quick=12),),
    "verify": (Section("verify", kernel_rows.verify_rows, 1.5, quick=14),),
    "linear": (
        Section("Llama-3.1-8B", _linear("8B"), quick=14),
        Section("Llama-3.2-1B", _linear("1B")),
        Section("attention", decoder_rows.attention_rows, 0.7, quick=6),
        Section("products of a layer", decoder_rows.product_rows, 0.7, quick=8),
        Section("Llama-3.2-3B", _linear("3B")),
    ),
    "forward": (
        Section("Llama-3.2-1B", _forward("Llama-3.2-1B"), quick=12),
        Section("Llama-3.1-8B", _forward("Llama-3.1-8B")),
        Section("Llama-3.2-3B", _forward("Llama-3.2-3B")),
    ),
    "loop": (
        Section("decision", loop_rows.decision_rows, 1.5, quick=8),
        Section("shares", _loops(shares.share_rows), quick=12),
        Section("conditional", loop_rows.conditional_rows, quick=6),
        Section("draft step", loop_rows.draft_step_rows, 0.5, quick=4),
        Section("host", _loops(shares.host_rows), 0.7, quick=6),
        Section("unfused", loop_rows.unfused_rows, 0.3, quick=3),
    ),
    "e2e": (
        Section("default pair", pair_rows.default_pair_rows, quick=4),
        Section("Llama-3.2-3B", _pairs("Llama-3.2-3B"), 2.0, quick=16),
        Section("assisted", pair_rows.assisted_rows, 0.5, quick=10),
    ),
    "e2e-8b": (Section("Llama-3.1-8B", _pairs("Llama-3.1-8B")),),
    "audit": (
        Section("waits", _loops(audit.wait_rows), quick=8),
        Section("memory", _loops(audit.memory_rows), 2.0, quick=8),
        # The profiler may not survive conditional nodes.
        Section("trace", _loops(audit.traced_rows), 0.7, alone=True, vital=False),
    ),
    "sanitizer": (
        Section("memcheck", partial(suites.sanitizer_rows, tool="memcheck")),
        Section("racecheck", partial(suites.sanitizer_rows, tool="racecheck")),
    ),
    "tests": (_tests(suites.FILES, quick=24),),
    "tests-decision": (_tests(suites.DECISION_FILES, quick=10),),
    "tests-decoder": (_tests(suites.DECODER_FILES, quick=14),),
    "races": (Section("races", partial(suites.race_rows, files=_RACES), quick=10),),
    "races-decoder": (Section("races", partial(suites.race_rows, files=_DECODER_RACES)),),
}
GROUPS = {"kernels": ("draft", "verify", "linear")}
"""Parts under one name."""
