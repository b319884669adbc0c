"""The parts of the GPU command and their sections, those first that matter most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def _linear(model: str) -> Callable[[Lab], Iterator[Row]]:
    return partial(linear_rows.linear_rows, model=model)


PARTS: dict[str, tuple[Section, ...]] = {
    "probe": (Section("probe", suites.probe_rows),),
    "draft": (Section("draft", kernel_rows.draft_rows),),
    "verify": (Section("verify", kernel_rows.verify_rows, 1.5),),
    "linear": (
        Section("Llama-3.1-8B", _linear("8B")),
        Section("Llama-3.2-1B", _linear("1B")),
        Section("attention", decoder_rows.attention_rows, 0.7),
        Section("products of a layer", decoder_rows.product_rows, 0.7),
        Section("Llama-3.2-3B", _linear("3B")),
    ),
    "forward": tuple(
        Section(model, partial(roofline.forward_rows, model=model))
        for model in ("Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.2-3B")
    ),
    "loop": (
        Section("decision", loop_rows.decision_rows, 1.5),
        Section("shares", partial(_loop_models, rows=shares.share_rows)),
        Section("conditional", loop_rows.conditional_rows),
        Section("draft step", loop_rows.draft_step_rows, 0.5),
        Section("host", partial(_loop_models, rows=shares.host_rows), 0.7),
        Section("unfused", loop_rows.unfused_rows, 0.3),
    ),
    "e2e": (
        Section("default pair", pair_rows.default_pair_rows),
        Section("Llama-3.2-3B", partial(e2e_rows.e2e_rows, target="Llama-3.2-3B"), 2.0),
        Section("assisted", pair_rows.assisted_rows, 0.5),
    ),
    "e2e-8b": (Section("Llama-3.1-8B", partial(e2e_rows.e2e_rows, target="Llama-3.1-8B")),),
    "audit": (
        Section("waits", partial(_loop_models, rows=audit.wait_rows)),
        Section("memory", partial(_loop_models, rows=audit.memory_rows), 2.0),
        Section("trace", partial(_loop_models, rows=audit.traced_rows), 0.7, alone=True),
    ),
    "sanitizer": tuple(
        Section(tool, partial(suites.sanitizer_rows, tool=tool))
        for tool in ("memcheck", "racecheck")
    ),
    "tests": (Section("tests", partial(suites.test_rows, files=suites.FILES)),),
    "tests-decision": (Section("tests", partial(suites.test_rows, files=suites.DECISION_FILES)),),
    "tests-decoder": (Section("tests", partial(suites.test_rows, files=suites.DECODER_FILES)),),
    "races": (Section("races", partial(suites.race_rows, files=_RACES)),),
    "races-decoder": (Section("races", partial(suites.race_rows, files=_DECODER_RACES)),),
}
GROUPS = {"kernels": ("draft", "verify", "linear")}
"""Parts under one name."""
