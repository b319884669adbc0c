"""PTX of the kernel that hands published conditions to the conditional nodes of a CUDA graph.

``cudaGraphSetConditional`` is a device function that the driver supplies when it loads the module;
Triton cannot call it. So this is the one kernel that is not Triton's: for up to four handles it
reads the lower half of a word of `LoopState.conditions` and sets the handle to it. One thread.
"""

from __future__ import annotations

__all__ = ["HANDLES_MAX", "NAME", "NO_WORD", "ptx"]

NAME = "set_conditions"
HANDLES_MAX = 4
NO_WORD = 0xFFFFFFFF
"""In place of a word's index: leave this handle alone."""


def ptx(target: str = "sm_80") -> str:
    """The module's text.

    Its entry takes the address of the words (u64), then for each of four handles the handle (u64)
    and the index of its word (u32), `NO_WORD` for none.

    Parameters
    ----------
    target : str
        The oldest architecture that it shall run on.
    """
    parameters = [".param .u64 words"]
    body = []
    for i in range(HANDLES_MAX):
        parameters += [f".param .u64 handle_{i}", f".param .u32 word_{i}"]
        body.append(_ONE.replace("#", str(i)))
    return _MODULE.format(
        target=target, name=NAME, parameters=",\n  ".join(parameters), body="".join(body)
    )


_MODULE = """\
.version 8.0
.target {target}
.address_size 64

.extern .func cudaGraphSetConditional (.param .b64 handle, .param .b32 value);

.visible .entry {name} (
  {parameters}
)
.maxntid 1, 1, 1
{{
  .reg .pred %none;
  .reg .b32 %word, %value;
  .reg .b64 %base, %offset, %handle, %address;
  ld.param.u64 %base, [words];
  cvta.to.global.u64 %base, %base;
{body}  ret;
}}
"""

_ONE = """\
  ld.param.u32 %word, [word_#];
  setp.eq.u32 %none, %word, 0xffffffff;
  @%none bra SKIP_#;
  ld.param.u64 %handle, [handle_#];
  mul.wide.u32 %offset, %word, 8;
  add.u64 %address, %base, %offset;
  ld.global.u32 %value, [%address];
  {
    .param .b64 p_handle;
    .param .b32 p_value;
    st.param.b64 [p_handle], %handle;
    st.param.b32 [p_value], %value;
    call.uni cudaGraphSetConditional, (p_handle, p_value);
  }
SKIP_#:
"""
