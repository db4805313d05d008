"""Powers of 2 that leave part of the work to the fp32 pipes.

The exponent unit gives 16 results a cycle and multiprocessor. With heads of 64 one score takes the matrix unit as long
as its exponential takes the exponent unit, which can then delay the matrix unit and hardly hide behind it. A share of
the exponentials by a polynomial relieves it, as in FlashAttention-4 (Dao et al.) on Blackwell.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 2^f = 1 + c1 f + c2 f^2 + ... for |f| <= 1/2 by the least largest relative error, which is 3e-6
COEFFICIENTS = (0x3F317096, 0x3E7601BC, 0x3D64FE23, 0x3C1D0166)
ROUND = 0x4B400000  # 1.5 x 2^23: what is added to it is rounded to an integer, in the lowest bits
LEAST = 0xC2FC0000  # -126: its power is the least that is normal, and stands for all below
PACKED = 8  # results of one piece of assembly


def assembly(share: int) -> str:
    """PTX for eight powers of 2, of which `share`, 1 to 8, evenly spread, come by the polynomial."""
    chosen = {PACKED * i // share for i in range(share)}
    lines = ["{ .reg .f32 x, t, f, p; .reg .b32 n, m;"]
    for i in range(PACKED):
        target, source = f"${i}", f"${i + PACKED}"
        lines += _polynomial(target, source) if i in chosen else [f"ex2.approx.ftz.f32 {target}, {source};"]
    return " ".join([*lines, "}"])


def _polynomial(target: str, source: str) -> list[str]:
    *lower, highest = COEFFICIENTS
    return [
        f"max.f32 x, {source}, 0f{LEAST:08X};",
        f"add.rn.f32 t, x, 0f{ROUND:08X};",
        f"sub.rn.f32 f, t, 0f{ROUND:08X};",
        "sub.rn.f32 f, x, f;",
        f"mov.f32 p, 0f{highest:08X};",
        *(f"fma.rn.f32 p, p, f, 0f{c:08X};" for c in [*lower[::-1], 0x3F800000]),
        "mov.b32 n, t;",
        "shl.b32 n, n, 23;",
        "mov.b32 m, p;",
        "add.s32 m, m, n;",
        f"mov.b32 {target}, m;",
    ]


@gluon.jit
def powers(x, ASSEMBLY: gl.constexpr):
    """2 ** x elementwise, fp32, x <= 0. ASSEMBLY: by `assembly`, or empty for the exponent unit alone."""
    OPERANDS: gl.constexpr = "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r"
    if ASSEMBLY == "":
        return gl.exp2(x)
    else:
        return gl.inline_asm_elementwise(ASSEMBLY, OPERANDS, [x], dtype=gl.float32, is_pure=True, pack=8)
