"""Values of 4-bit NormalFloat codes, four bytes of codes at a time; imports no triton.

PTX's ``prmt`` picks four bytes out of eight by the low three bits of four nibbles, so two of them
look four codes up in one byte of a table of sixteen, and a third takes of each code the one that
the code's top bit asks for. A 16-bit value is two such bytes. That is about 2.6 integer
instructions a weight, and no memory.
"""

from __future__ import annotations

import torch

NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The code table of nf4 in bitsandbytes, in fp32 (Dettmers et al., QLoRA, 2023, appendix E)."""


def table_lookup(dtype: torch.dtype) -> str:
    """PTX that maps ``$4``, four bytes of two nf4 codes each, to their values in ``dtype``.

    Parameters
    ----------
    dtype : torch.float16 | torch.bfloat16

    Returns
    -------
    str
        It writes to ``$0 .. $3`` the values of the four bytes, that of the high nibble, which comes
        first, in the low half.
    """
    words = [v & 0xFFFF for v in torch.tensor(NF4_TABLE).to(dtype).view(torch.int16).tolist()]
    planes = [[w >> shift & 0xFF for w in words] for shift in (0, 8)]
    lines = [
        ".reg .b32 code, side, low, high, small, large;",
        "and.b32 code, $4, 0x77777777;",
        "shr.b32 side, $4, 1;",
        "and.b32 side, side, 0x44444444;",
        "or.b32 side, side, 0x32103210;",
    ]
    for pair in range(2):
        if pair:
            lines += ["shr.b32 code, code, 16;", "shr.b32 side, side, 16;"]
        for name, plane in zip(("low", "high"), planes, strict=True):
            quads = [int.from_bytes(bytes(plane[i : i + 4]), "little") for i in range(0, 16, 4)]
            lines += [
                f"prmt.b32 small, {quads[0]:#010x}, {quads[1]:#010x}, code;",
                f"prmt.b32 large, {quads[2]:#010x}, {quads[3]:#010x}, code;",
                f"prmt.b32 {name}, small, large, side;",
            ]
        lines += [
            f"prmt.b32 ${2 * pair}, low, high, 0x4051;",
            f"prmt.b32 ${2 * pair + 1}, low, high, 0x6273;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


NF4_FP16 = table_lookup(torch.float16)
NF4_BF16 = table_lookup(torch.bfloat16)
