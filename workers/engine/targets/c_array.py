"""A .tflite file as C source: what a firmware compiles in, for flash without a file system."""

import re

from app.domain.micro import identifier
from workers.engine import inspect_tflite

_PER_LINE = 12
_BYTES = tuple(f"0x{byte:02x}," for byte in range(256))
_ALIGNMENT = 16  # TFLM reads tensors in place, by vectors of up to 16 bytes


def c_array(content: bytes, name: str, arena_bytes: int | None) -> tuple[str, str]:
    """(source, header): `NAME.c` and `NAME.h`, NAME being `identifier(name)`; C11 and C++11.

    They declare `NAME_data`, aligned to 16 bytes, and the constants `NAME_SIZE_BYTES` and, where
    the arena was measured, `NAME_ARENA_BYTES` (upper case). The header's comment lists the
    operators that the firmware has to register. Raises WorkError `invalid_model`.
    """
    name = identifier(name)
    return _source(content, name, arena_bytes), _header(content, name, arena_bytes)


def _header(content: bytes, name: str, arena_bytes: int | None) -> str:
    upper = name.upper()
    graph = inspect_tflite.parse(content)
    # A custom operator's name is the file's own: it must not end the comment.
    operators = sorted(
        {re.sub(r"[^\w\-. ]", "?", op.name)[:80] for sub in graph.subgraphs for op in sub.ops}
    )
    arena = (
        "/* The tensor arena was not measured. */\n"
        if arena_bytes is None
        else f"/* Bytes of the tensor arena, to be aligned to {_ALIGNMENT} bytes. */\n"
        f"#define {upper}_ARENA_BYTES {arena_bytes}u\n"
    )
    return f"""\
/* A LiteRT model for TensorFlow Lite Micro. Operators to register:
{"".join(f" *   {operator}{chr(10)}" for operator in operators)} */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

/* Bytes of {name}_data. */
#define {upper}_SIZE_BYTES {len(content)}u
{arena}
#ifdef __cplusplus
extern "C" {{
#endif

extern const uint8_t {name}_data[{upper}_SIZE_BYTES];

#ifdef __cplusplus
}}
#endif

#endif /* {upper}_H */
"""


def _source(content: bytes, name: str, arena_bytes: int | None) -> str:
    lines = (
        "    " + " ".join(map(_BYTES.__getitem__, content[start : start + _PER_LINE]))
        for start in range(0, len(content), _PER_LINE)
    )
    data = "\n".join(lines)
    arena = "not measured" if arena_bytes is None else f"{arena_bytes} bytes"
    return f"""\
/* {len(content)} bytes; tensor arena: {arena}. */
#include "{name}.h"

#ifndef __cplusplus
#include <stdalign.h>
#endif

alignas({_ALIGNMENT}) const uint8_t {name}_data[{name.upper()}_SIZE_BYTES] = {{
{data}
}};
"""
