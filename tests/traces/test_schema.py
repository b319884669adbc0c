"""The trace file: what is written comes back, and what is damaged is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speckv.errors import TraceError
from speckv.traces import schema
from speckv.traces.schema import Answer, Rows, Trace, join, read_parts, read_trace, write_trace
from tests.traces.synthetic import INFO, made_up_trace


def parts_of(trace: Trace) -> Iterator[tuple[Answer, Rows]]:
    for i, answer in enumerate(trace.answers):
        yield answer, trace.rows.take(np.arange(trace.first[i], trace.first[i + 1]))


def assert_same(actual: Trace, expected: Trace) -> None:
    assert actual.info == expected.info
    assert actual.answers == expected.answers
    assert actual.first.dtype == np.int64
    np.testing.assert_array_equal(actual.first, expected.first)
    for name, values in vars(expected.rows).items():
        found = getattr(actual.rows, name)
        assert found.dtype == values.dtype and found.shape == values.shape, name
        np.testing.assert_array_equal(found, values, err_msg=name)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return made_up_trace()


@pytest.fixture
def path(trace: Trace, tmp_path: Path) -> Path:
    """A trace file of several row groups."""
    file = tmp_path / "trace.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "_ROW_GROUP", 300)
        write_trace(file, trace.info, parts_of(trace))
    return file


def test_a_trace_comes_back(trace: Trace, path: Path) -> None:
    assert pq.ParquetFile(path).num_row_groups > 2
    assert_same(read_trace(path), trace)
    assert_same(join(INFO, read_parts(path)), trace)


def test_others_read_it_without_speckv(trace: Trace, path: Path) -> None:
    table = pq.read_table(path)
    assert table.num_rows == len(trace.rows) == sum(trace.lengths)
    row = table.slice(int(trace.first[1]), 1).to_pylist()[0]
    assert row["position"] == 0 and row["prompt_tokens"] == list(trace.answers[1].prompt_tokens)
    assert len(row["draft_tokens"]) == 15
    assert row["margin"][3] == trace.rows.signals[trace.first[1], 3, 2]
    assert table.slice(1, 1).to_pylist()[0]["prompt_tokens"] is None


def test_where_keeps_whole_answers(trace: Trace) -> None:
    kept = trace.where(lambda a: a.compression == "int8" and a.task == "math")
    assert len(kept.answers) == 6
    for i, answer in enumerate(kept.answers):
        j = trace.answers.index(answer)
        for name, values in vars(kept.rows).items():
            np.testing.assert_array_equal(
                values[kept.first[i] : kept.first[i + 1]],
                getattr(trace.rows, name)[trace.first[j] : trace.first[j + 1]],
            )
    assert len(trace.where(lambda a: False).rows) == 0


def test_a_trace_has_answers() -> None:
    with pytest.raises(ValueError, match="parts: expected at least one answer, got none"):
        join(INFO, [])


def refuses(path: Path, text: str) -> None:
    with pytest.raises(TraceError, match=text) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "none.parquet", "no such trace file")
    text = tmp_path / "notes.txt"
    text.write_text("hello\n")
    refuses(text, "damaged, or not a Parquet file")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    refuses(other, "no trace of speckv")


def rewritten(path: Path, metadata: bytes | None = None, **columns: pa.Array) -> Path:
    """The file with other metadata or columns."""
    table = pq.read_table(path)
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(name), values)
    if metadata is not None:
        digest = hashlib.sha256(metadata).hexdigest()
        table = table.replace_schema_metadata({b"speckv": metadata, b"speckv.sha256": digest})
    pq.write_table(table, path)
    return path


def test_other_versions_are_refused(path: Path) -> None:
    old = INFO.to_json().replace('"version": 1', '"version": 0').encode()
    refuses(rewritten(path, old), "version 1 .* got .*0, 15.*; record it again")
    refuses(rewritten(path, b'{"format": "speckv-trace"}'), "bad trace metadata")
    refuses(rewritten(path, b"[]"), "bad trace metadata")


def test_impossible_rows_are_refused(path: Path, trace: Trace) -> None:
    accepted = trace.rows.accepted.copy()
    accepted[5] = 16
    refuses(rewritten(path, accepted=pa.array(accepted)), "out of range")
    position = np.arange(len(trace.rows), dtype=np.int32)
    position[7] = 3
    refuses(rewritten(path, position=pa.array(position)), "positions that do not follow")


def test_damage_is_found(path: Path, trace: Trace) -> None:
    """A flipped bit anywhere, or a missing end, is refused or changes nothing."""
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [0, 1, len(whole) - 1, whole.index(b"a processor")]
    places += rng.integers(0, len(whole), 150).tolist()
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert_same(read_trace(path), trace)
        except TraceError:
            refused += 1
    assert refused > 0.9 * len(places)
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refuses(path, "damaged, or not a Parquet file")


def test_an_interrupted_write_leaves_the_old_file(path: Path, trace: Trace) -> None:
    def interrupted() -> Iterator[tuple[Answer, Rows]]:
        yield from list(parts_of(trace))[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trace(path, replace(INFO, device="another"), interrupted())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert_same(read_trace(path), trace)
