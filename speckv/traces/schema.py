"""The exact trace: what a draft proposes at every place of its target's own text.

A target's text does not depend on the policy (greedily, or under Gumbel coupling). So a trace holds
one row for each of its tokens: the token, the target's certainty about it, what the draft would
propose from there on, up to ``GAMMA_MAX`` tokens, with the signals of each, and how many of them
the target accepts. Any policy can be replayed on that exactly.

The file is Parquet, with checksums on its pages. Columns, one row per (answer, position):

===================  ===============  ===========================================================
prompt_id            int32            place of the prompt in the list that was recorded
task, compression    string
temperature, seed    float32, int64   of the target's text; the request id is always 0
limit                int32            most new tokens of the answer
position             int32            place in the answer, from 0; a step may begin at 1 and later
prompt_tokens        list of int32    at position 0; null elsewhere
target_token         int32            the target's token at this place
target_entropy       float32          bits, of the distribution that it came from; known to a
target_margin        float32          policy only once the token is committed
drafted              int8             draft tokens recorded: 15, or 0 beyond the draft's context
draft_tokens         [15] int32       from this place on, as target ids
entropy              [15] float32     bits, of each draft token's distribution
confidence, margin   [15] float32
token_probability    [15] float32
accepted             int8             draft tokens that are the target's own, up to the first
                                      that is not
===================  ===============  ===========================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import TraceError
from ..files import write_atomically
from ..kernels.layout import GAMMA_MAX
from ..policies import CostTable
from .matches import match_lengths

FORMAT, VERSION = "speckv-trace", 1
_KEY, _DIGEST_KEY = b"speckv", b"speckv.sha256"
_ROW_GROUP = 8192
_SIGNALS = ("entropy", "confidence", "margin", "token_probability")  # in the order of `layout`


def _block(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False), GAMMA_MAX)


_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=name == "prompt_tokens")
        for name, kind in (
            ("prompt_id", pa.int32()),
            ("task", pa.string()),
            ("compression", pa.string()),
            ("temperature", pa.float32()),
            ("seed", pa.int64()),
            ("limit", pa.int32()),
            ("position", pa.int32()),
            ("prompt_tokens", pa.list_(pa.field("element", pa.int32(), nullable=False))),
            ("target_token", pa.int32()),
            ("target_entropy", pa.float32()),
            ("target_margin", pa.float32()),
            ("drafted", pa.int8()),
            ("draft_tokens", _block(pa.int32())),
            *((name, _block(pa.float32())) for name in _SIGNALS),
            ("accepted", pa.int8()),
        )
    ]
)


@dataclass(frozen=True)
class TraceInfo:
    """What a trace was recorded with.

    Attributes
    ----------
    target, draft : mapping
        ``name``, ``fingerprint`` (None where the model has none) and ``vocab_size``; the target's
        also ``dtype``, of activations and KV cache, by compression.
    device : str
        Name of the processor or GPU.
    versions : mapping
        Of the packages that the numbers depend on.
    recipe : mapping
        Settings of the recording.
    costs : mapping of str to CostTable
        Measured costs of a step by compression; may be empty.
    """

    target: Mapping[str, Any]
    draft: Mapping[str, Any]
    device: str
    versions: Mapping[str, str]
    recipe: Mapping[str, Any]
    costs: Mapping[str, CostTable] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's metadata."""
        facts = {"format": FORMAT, "version": VERSION, "gamma_max": GAMMA_MAX} | asdict(self)
        return json.dumps(facts, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> TraceInfo:
        """Read `to_json`'s text.

        Raises
        ------
        TraceError
            It is of another format or version, or incomplete.
        """
        try:
            facts = json.loads(text)
            kind = (facts["format"], facts["version"], facts["gamma_max"])
            if kind == (FORMAT, VERSION, GAMMA_MAX):
                costs = {name: CostTable.from_dict(c) for name, c in facts["costs"].items()}
                names = ("target", "draft", "device", "versions", "recipe")
                return cls(**{name: facts[name] for name in names}, costs=costs)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TraceError(f"{where}: bad trace metadata ({error!r})") from None
        raise TraceError(
            f"{where}: expected {FORMAT} version {VERSION} with γ up to {GAMMA_MAX}, got {kind}; "
            "record it again with this version of speckv"
        )


@dataclass(frozen=True)
class Answer:
    """One text of the target and what decides it.

    Attributes
    ----------
    prompt_id : int
    task : str
    compression : str
        Weight format of the target.
    temperature : float
        0 is greedy.
    seed : int
    limit : int
        Most new tokens; the text is shorter only if it ends itself.
    prompt_tokens : tuple of int
    """

    prompt_id: int
    task: str
    compression: str
    temperature: float
    seed: int
    limit: int
    prompt_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """The rows of one or more answers; R of them.

    Attributes
    ----------
    target_token : int32 [R]
    target_entropy, target_margin : float32 [R]
    drafted : int8 [R]
    draft_tokens : int32 [R, GAMMA_MAX]
    signals : float32 [R, GAMMA_MAX, SIGNALS]
        In the order of `speckv.kernels.layout`.
    accepted : int8 [R]
    """

    target_token: np.ndarray
    target_entropy: np.ndarray
    target_margin: np.ndarray
    drafted: np.ndarray
    draft_tokens: np.ndarray
    signals: np.ndarray
    accepted: np.ndarray

    def __len__(self) -> int:
        return len(self.target_token)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at ``index``, or where it is true."""
        return Rows(**{name: values[index] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Trace:
    """A whole trace in memory.

    Attributes
    ----------
    info : TraceInfo
    answers : tuple of Answer
    first : int64 [len(answers) + 1]
        Row of each answer's position 0, and the number of rows.
    rows : Rows
    match : int8 [R, WIDTH_MAX]
        Of `speckv.traces.matches`: what a step that begins at each row is told of them.
    """

    info: TraceInfo
    answers: tuple[Answer, ...]
    first: np.ndarray
    rows: Rows
    match: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """New tokens of each answer, int64."""
        return np.diff(self.first)

    @property
    def mean_temperature(self) -> float:
        """Of the answers, as `Policy.pack` takes it."""
        return sum(answer.temperature for answer in self.answers) / max(len(self.answers), 1)

    def where(self, keep: Callable[[Answer], bool]) -> Trace:
        """The answers that ``keep`` keeps; all of their rows."""
        kept = [i for i, answer in enumerate(self.answers) if keep(answer)]
        lengths = self.lengths
        mask = np.zeros(len(self.answers), dtype=bool)
        mask[kept] = True
        return replace(
            self,
            answers=tuple(self.answers[i] for i in kept),
            first=np.concatenate(([0], np.cumsum(lengths[kept], dtype=np.int64))),
            rows=self.rows.take(np.repeat(mask, lengths)),
            match=self.match[np.repeat(mask, lengths)],
        )


def join(info: TraceInfo, parts: Iterable[tuple[Answer, Rows]]) -> Trace:
    """A trace of answers, in their order.

    Raises
    ------
    ValueError
        There are none.
    """
    pairs = list(parts)
    if not pairs:
        raise ValueError("parts: expected at least one answer, got none")
    lengths = [len(rows) for _, rows in pairs]
    columns = {
        name: np.concatenate([getattr(rows, name) for _, rows in pairs])
        for name in vars(pairs[0][1])
    }
    first = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return _trace(info, tuple(answer for answer, _ in pairs), first, Rows(**columns))


def _trace(info: TraceInfo, answers: tuple[Answer, ...], first: np.ndarray, rows: Rows) -> Trace:
    match = [
        match_lengths(answer.prompt_tokens, rows.target_token[a:b], rows.draft_tokens[a:b])
        for answer, a, b in zip(answers, first[:-1], first[1:], strict=True)
    ]
    return Trace(info, answers, first, rows, np.concatenate(match))


def write_trace(path: Path, info: TraceInfo, parts: Iterable[tuple[Answer, Rows]]) -> None:
    """Write a trace file, row group by row group, to a temporary name; then rename it.

    Parameters
    ----------
    parts : iterable of (Answer, Rows)
        Consumed one at a time, so that a trace need not fit into memory.
    """
    text = info.to_json().encode()
    schema = _SCHEMA.with_metadata({_KEY: text, _DIGEST_KEY: _digest(text)})
    floats = [f"{name}.list.element" for name in _SIGNALS]
    named = [f.name for f in _SCHEMA if f.name not in _SIGNALS and not f.name.endswith("_tokens")]

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=named,
            use_byte_stream_split=floats,
            write_page_checksum=True,
        ) as writer:
            waiting: list[pa.Table] = []
            for answer, rows in parts:
                waiting.append(_to_table(answer, rows))
                if sum(table.num_rows for table in waiting) >= _ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting).combine_chunks())
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())

    write_atomically(path, write)


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises
    ------
    TraceError
        It is missing, no trace, of another version, or damaged.
    """
    info, table = _read(path)
    try:
        position = table["position"].to_numpy()
        starts = np.flatnonzero(position == 0)
        first = np.append(starts, len(position)).astype(np.int64)
        steps = np.arange(len(position)) - np.repeat(starts, np.diff(first))
        if not len(starts) or starts[0] != 0 or not np.array_equal(position, steps):
            raise ValueError("positions that do not follow one another")
        rows = Rows(
            **{
                name: table[name].to_numpy()
                for name in ("target_token", "target_entropy", "target_margin", "drafted")
            },
            draft_tokens=_matrix(table["draft_tokens"]),
            signals=np.stack([_matrix(table[name]) for name in _SIGNALS], axis=-1),
            accepted=table["accepted"].to_numpy(),
        )
        low, high = rows.accepted.min(), (rows.accepted - rows.drafted).max()
        if low < 0 or high > 0 or rows.drafted.max() > GAMMA_MAX:
            raise ValueError("counts of accepted or drafted tokens out of range")
        heads = table.take(pa.array(starts)).to_pylist()
        names = [f for f in Answer.__dataclass_fields__ if f != "prompt_tokens"]
        answers = tuple(
            Answer(**{n: head[n] for n in names}, prompt_tokens=tuple(head["prompt_tokens"]))
            for head in heads
        )
    except (TypeError, ValueError) as error:
        raise TraceError(f"{path}: not a valid trace ({error})") from None
    return _trace(info, _as_written(answers), first, rows)


def read_parts(path: Path) -> Iterable[tuple[Answer, Rows]]:
    """The answers of a trace file, one by one; errors are those of `read_trace`."""
    trace = read_trace(path)
    for i, answer in enumerate(trace.answers):
        yield answer, trace.rows.take(np.arange(trace.first[i], trace.first[i + 1]))


def _as_written(answers: tuple[Answer, ...]) -> tuple[Answer, ...]:
    """Temperatures as the shortest decimal that float32 cannot tell from what was read."""
    return tuple(replace(a, temperature=float(str(np.float32(a.temperature)))) for a in answers)


def _read(path: Path) -> tuple[TraceInfo, pa.Table]:
    if not path.is_file():
        raise TraceError(f"{path}: no such trace file")
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        metadata = file.schema_arrow.metadata or {}
        if _KEY not in metadata:
            raise TraceError(f"{path}: a Parquet file, but no trace of speckv")
        if metadata.get(_DIGEST_KEY) != _digest(metadata[_KEY]):
            raise TraceError(f"{path}: damaged, the checksum of its metadata does not match")
        info = TraceInfo.from_json(metadata[_KEY], str(path))
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise TraceError(f"{path}: damaged, or not a Parquet file ({reason})") from None
    if not table.schema.equals(_SCHEMA):
        raise TraceError(f"{path}: its columns are not those of version {VERSION}")
    return info, table


def _digest(text: bytes) -> bytes:
    """Of the metadata, which the checksums of Parquet's pages do not cover."""
    return hashlib.sha256(text).hexdigest().encode()


def _to_table(answer: Answer, rows: Rows) -> pa.Table:
    count = len(rows)
    prompt: list[Any] = [None] * count
    prompt[0] = list(answer.prompt_tokens)
    repeated = {
        name: [getattr(answer, name)] * count
        for name in ("prompt_id", "task", "compression", "temperature", "seed", "limit")
    }
    columns = repeated | {
        "position": np.arange(count, dtype=np.int32),
        "prompt_tokens": prompt,
        "target_token": rows.target_token,
        "target_entropy": rows.target_entropy,
        "target_margin": rows.target_margin,
        "drafted": rows.drafted,
        "accepted": rows.accepted,
    }
    blocks = {"draft_tokens": rows.draft_tokens} | {
        name: rows.signals[:, :, i] for i, name in enumerate(_SIGNALS)
    }
    arrays = []
    for column in _SCHEMA:
        if column.name in blocks:
            flat = pa.array(np.ascontiguousarray(blocks[column.name]).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=column.type))
        else:
            arrays.append(pa.array(columns[column.name], type=column.type))
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """[R, GAMMA_MAX] of a column of fixed-size lists."""
    whole = column.combine_chunks()
    return np.asarray(whole.flatten().to_numpy()).reshape(len(whole), GAMMA_MAX)
