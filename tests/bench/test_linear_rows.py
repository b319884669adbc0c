"""The rows of products are checked, complete, and without times where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench import gpu, linear_rows, roofline
from speckv import kernels
from speckv.errors import ModelError
from speckv.models import quantize


def test_dry_run(tmp_path: Path) -> None:
    rows = gpu.run_part("linear", gpu.Lab(quick=False, dry=True), tmp_path)
    assert not any(map(gpu.failed, rows))
    assert not any("skipped" in row or "problem" in row for row in rows)
    assert {row.get("kernel_us") for row in rows} == {None}
    products = [row for row in rows if row["name"] == "linear"]
    assert all(row["matches_reference"] and row["share_of_copy"] is None for row in products)
    assert {(row["kind"], row["width"]) for row in products} == {
        (kind, width) for kind in linear_rows.KINDS for width in (1, 9)
    }
    assert {row["shape"].split()[0] for row in products} == {"1B", "3B", "8B"}
    sizes = {row["kind"]: row["bytes"] for row in products}
    assert sizes == {
        "bf16": 2 * 96 * 128,
        "int8": 96 * 128 + 4 * 96,
        "nf4": 96 * 128 // 2 + 4 * 96 * 128 // 64,
        "nf4 nested": 96 * 128 // 2 + 96 * 128 // 64 + 4,
    }
    assert {row["name"] for row in rows} - {"linear"} == {
        *("copy", "F.linear", "bitsandbytes.matmul_4bit", "bitsandbytes.matmul int8"),
        *("attention", "rope_append", "F.scaled_dot_product_attention", "product of a layer"),
        "expand",
    }
    layer = [row for row in rows if row["name"] == "product of a layer"]
    parts = ("qkv", "out", "gate-up", "down", "head")
    assert {row["shape"] for row in layer} == {f"tiny {part}" for part in parts}
    assert all(row["matches_reference"] for row in layer)
    expanded = {(row["shape"], row["kind"]): row for row in rows if row["name"] == "expand"}
    assert set(expanded) == {(f"tiny {p}", kind) for p in parts[:4] for kind in ("nf4", "int8")}
    assert all(row["matches_reference"] for row in expanded.values())
    assert expanded["tiny down", "int8"]["bytes"] == 3 * 96 * 128 + 4 * 96


def test_shapes_are_those_of_the_models() -> None:
    names = {"8B": "Llama-3.1-8B", "1B": "Llama-3.2-1B", "3B": "Llama-3.2-3B"}
    for model, shapes in linear_rows.SHAPES.items():
        c = roofline.shape(roofline.MODELS[names[model]])
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        assert {name: size for name, *size in shapes} == {
            "qkv": [queries + 2 * keys, c.hidden, False],
            "out": [c.hidden, queries, False],
            "gate-up": [2 * c.intermediate, c.hidden, True],
            "down": [c.hidden, c.intermediate, False],
            "head": [c.vocab_size, c.hidden, False],
        }


def test_without_bitsandbytes_formats_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModelError("compression int8 and nf4 need bitsandbytes")

    monkeypatch.setattr(quantize, "_bitsandbytes", missing)
    dry = gpu.Lab(quick=False, dry=True)
    rows = list(linear_rows.linear_rows(dry))
    skipped = {(row["shape"], row["kind"]) for row in rows if "skipped" in row}
    assert skipped == {(s, k) for s in ("8B gate-up", "8B out") for k in linear_rows.KINDS[1:]}
    assert sum(row["name"] == "F.linear" for row in rows) == 4, "the rest is measured"
    forwards = list(roofline.forward_rows(dry))
    assert [r["compression"] for r in forwards if "skipped" in r] == ["int8", "nf4"]


def test_a_wrong_product_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(product: Any, x: Tensor, residual: Any = None, *, out: Tensor) -> None:
        out.zero_()

    monkeypatch.setattr(kernels.Linear, "__call__", zero)
    rows = gpu.run_part("linear", gpu.Lab(quick=True, dry=True), tmp_path)
    products = [row for row in rows if row["name"] in ("linear", "product of a layer")]
    assert products and all(map(gpu.failed, products))
    assert not any("kernel_us" in row for row in products)
