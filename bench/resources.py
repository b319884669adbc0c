"""Instructions, registers and shared memory of every compiled kernel, against a kept baseline.

    python -m bench.resources            # what changed
    python -m bench.resources --accept   # make what compiles now the baseline

Kernels are compiled ahead of time, so this needs no GPU. The baseline holds a table for each pair
of Triton and ptxas versions: another compiler makes other code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.environment import write_json
from speckv.kernels import registry
from speckv.kernels.registry import CompiledResources

BASELINE = Path(__file__).resolve().parent / "baselines" / "resources.json"
TOLERANCE = 0.05

Used = Mapping[str, int]
Table = Mapping[str, Used]
"""Resources by ``"kernel/variant/architecture"``."""


def used(compiled: CompiledResources) -> Used:
    """What is compared of a compiled variant."""
    return {
        "instructions": compiled.instructions,
        "registers": compiled.registers,
        "shared_bytes": compiled.shared_bytes,
    }


def label(compiled: CompiledResources) -> str:
    """Its name in a table."""
    return f"{compiled.kernel}/{compiled.variant}/{compiled.arch}"


def measure() -> dict[str, Used]:
    """Compile every variant of every kernel for every architecture."""
    table = {}
    for spec in registry.all_specs():
        for variant in spec.variants:
            for arch in variant.architectures:
                compiled = registry.compile_variant(spec, variant, arch)
                table[label(compiled)] = used(compiled)
    return table


def read_baseline(path: Path = BASELINE) -> Table:
    """The table of this compiler.

    Raises
    ------
    ValueError
        There is none.
    """
    tables = json.loads(path.read_text()) if path.is_file() else {}
    key = registry.toolchain()
    if key not in tables:
        raise ValueError(
            f"{path.name}: expected a baseline for {key}, found {', '.join(tables) or 'none'}; "
            "look at what changed and run: python -m bench.resources --accept"
        )
    table: Table = tables[key]
    return table


def regressions(name: str, now: Used, baseline: Table) -> list[str]:
    """What a variant uses more of than the baseline and `TOLERANCE` allow; a line each."""
    before = baseline.get(name)
    if before is None:
        return [f"{name}: not in the baseline"]
    lines = []
    for what, count in now.items():
        allowed = before[what]
        if count > allowed * (1 + TOLERANCE):
            more = f", {count / allowed - 1:+.1%}" if allowed else ""
            lines.append(f"{name}: {count} {what}{more} over the baseline's {allowed}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, or accept; 1 if something regressed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accept", action="store_true", help="make this the baseline")
    options = parser.parse_args(arguments)
    now = measure()
    if options.accept:
        tables = json.loads(BASELINE.read_text()) if BASELINE.is_file() else {}
        write_json(BASELINE, {**tables, registry.toolchain(): now})
        print(f"{len(now)} compiled variants are the baseline of {registry.toolchain()}")
        return 0
    baseline = read_baseline()
    lines = [line for name, found in now.items() for line in regressions(name, found, baseline)]
    lines += [f"{name}: in the baseline alone" for name in baseline if name not in now]
    print("\n".join(lines) or f"no regression in {len(now)} compiled variants")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
