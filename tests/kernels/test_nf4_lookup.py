"""The PTX that looks nf4 codes up, run by an emulator of the four instructions it is made of."""

from __future__ import annotations

import re

import bitsandbytes.functional as bnb
import pytest
import torch

from speckv.kernels.nf4_lookup import NF4_TABLE, table_lookup


def permute(a: int, b: int, selectors: int) -> int:
    """``prmt.b32``: byte i of the result is the one of a, b that nibble i selects, or its sign."""
    found = (a | b << 32).to_bytes(8, "little")
    picked = []
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = found[selector & 7]
        picked.append((0xFF if byte & 0x80 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def run(ptx: str, word: int) -> list[int]:
    """What the code writes to ``$0 .. $3`` for ``$4 = word``."""
    registers = {"$4": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for opcode, target, operands in re.findall(r"^(\w+)\.b32 (\S+), (.*);$", ptx, re.M):
        a, b, *rest = map(value, operands.split(", "))
        if opcode == "prmt":
            result = permute(a, b, rest[0])
        else:
            result = {"and": a & b, "or": a | b, "shr": a >> b}[opcode]
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_byte_in_every_place(dtype: torch.dtype) -> None:
    words = torch.tensor(NF4_TABLE).to(dtype).view(torch.int16).tolist()
    values = [word & 0xFFFF for word in words]
    ptx = table_lookup(dtype)
    for byte in range(256):
        four = [byte, byte * 7 % 256, 255 - byte, byte * 31 % 256]
        found = run(ptx, int.from_bytes(bytes(four), "little"))
        halves = [half for register in found for half in (register & 0xFFFF, register >> 16)]
        assert halves == [values[code] for b in four for code in (b >> 4, b & 15)]


def test_only_known_instructions_are_used() -> None:
    opcodes = re.findall(r"^(\w+)\.b32 \S+,", table_lookup(torch.float16), re.M)
    assert set(opcodes) == {"and", "or", "shr", "prmt"}
    assert len(opcodes) == 22


def test_the_table_is_that_of_bitsandbytes() -> None:
    assert torch.equal(bnb.get_4bit_type("nf4", device="cpu"), torch.tensor(NF4_TABLE))
