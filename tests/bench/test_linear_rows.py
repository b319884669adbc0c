"""The rows of products are checked, complete, and without times where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench import gpu
from speckv import kernels


def test_dry_run(tmp_path: Path) -> None:
    rows = gpu.run_part("linear", gpu.Lab(quick=True, dry=True), tmp_path)
    assert not any(map(gpu.failed, rows))
    assert {row.get("kernel_us") for row in rows} == {None}
    products = [row for row in rows if row["name"] == "linear"]
    assert all(row["matches_reference"] and row["share_of_copy"] is None for row in products)
    assert {(row["kind"], row["width"]) for row in products} == {
        (kind, width) for kind in ("bf16", "int8", "nf4") for width in (1, 5)
    }
    sizes = {row["kind"]: row["bytes"] for row in products}
    assert sizes == {
        "bf16": 2 * 96 * 128,
        "int8": 96 * 128 + 4 * 96,
        "nf4": 96 * 128 // 2 + 4 * 96 * 128 // 64,
    }
    assert {row["name"] for row in rows} - {"linear"} == {
        "copy",
        "F.linear",
        "bitsandbytes.matmul_4bit",
    }


def test_a_wrong_product_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(product: Any, x: Tensor, *, out: Tensor) -> None:
        out.zero_()

    monkeypatch.setattr(kernels.Linear, "__call__", zero)
    rows = gpu.run_part("linear", gpu.Lab(quick=True, dry=True), tmp_path)
    products = [row for row in rows if row["name"] == "linear"]
    assert products and all(map(gpu.failed, products))
    assert not any("kernel_us" in row for row in products)
