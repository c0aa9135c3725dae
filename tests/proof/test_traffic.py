"""Bytes between HBM and the chip, instruction by instruction, on small texts in the compiler's notation."""

from __future__ import annotations

import pytest

from partinf.proof.hlo import Module
from partinf.proof.traffic import hbm_bytes

WHOLE, PART = 8192 * 512, 2048 * 512
TEXT = """HloModule jit_step, is_scheduled=true

%wrapped (p.0: s8[8192,512], p.1: s32[]) -> s8[2048,512] {
  %p.0 = s8[8192,512]{1,0:T(32,128)(4,1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %inner = s8[2048,512]{1,0:T(32,128)(4,1)S(1)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={2048,512}
}

ENTRY %main (w: s8[8192,512], i: s32[]) -> s8[8192,512] {
  %w = s8[8192,512]{1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %here = s8[8192,512]{1,0:T(32,128)(4,1)S(1)} parameter(2)
  %row = s8[1,512]{1,0:T(32,128)(4,1)S(1)} parameter(3)
  %narrow = f32[64,16]{1,0:T(8,128)} parameter(4)
  @LINE@
}
"""
WHOLE_TEXT, PART_TEXT = "s8[8192,512]{1,0:T(32,128)(4,1)}", "s8[2048,512]{1,0:T(32,128)(4,1)@}"
ON_CHIP_TEXT = "s8[8192,512]{1,0:T(32,128)(4,1)S(1)}"


def part(space: str = "S(1)") -> str:
    return PART_TEXT.replace("@", space)


@pytest.mark.parametrize(
    ("line", "num_bytes"),
    [
        # A part of an array, fetched during other work: read once, and written only if it comes to lie in HBM.
        (f"(({WHOLE_TEXT}), {part()}, s32[]{{:S(2)}}) slice-start(%w), slice={{[0:2048], [0:512]}}", PART),
        (f"(({WHOLE_TEXT}), {part('')}, s32[]{{:S(2)}}) slice-start(%w), slice={{[0:2048], [0:512]}}", 2 * PART),
        (f"(({ON_CHIP_TEXT}), {part('')}, s32[]{{:S(2)}}) slice-start(%here), slice={{[0:2048], [0:512]}}", PART),
        (f"(({WHOLE_TEXT}, s32[]), {part()}, s32[]{{:S(2)}}) dynamic-slice-start(%w, %i), dynamic_slice_sizes={{2048,512}}", PART),
        (f"(({WHOLE_TEXT}, s32[]), {part()}, s32[]{{:S(2)}}) async-start(%w, %i), calls=%wrapped", PART),
        (f"{part()} slice-done(%started)", 0),
        (f"{part()} async-done(%started), calls=%wrapped", 0),
        # A whole array, towards the chip, away from it, and from HBM to HBM.
        (f"({ON_CHIP_TEXT}, {WHOLE_TEXT}, u32[]{{:S(2)}}) copy-start(%w)", WHOLE),
        (f"({WHOLE_TEXT}, {ON_CHIP_TEXT}, u32[]{{:S(2)}}) copy-start(%here)", WHOLE),
        (f"({WHOLE_TEXT}, {WHOLE_TEXT}, u32[]{{:S(2)}}) copy-start(%w)", 2 * WHOLE),
        (f"{ON_CHIP_TEXT} copy-done(%started)", 0),
        # The same at once.
        (f"{part()} slice(%w), slice={{[0:2048], [0:512]}}", PART),
        (f"{part('')} slice(%w), slice={{[0:2048], [0:512]}}", 2 * PART),
        (f"{part('')} slice(%here), slice={{[0:2048], [0:512]}}", PART),
        (f"{part()} slice(%here), slice={{[0:2048], [0:512]}}", 0),
        # Sixteen elements fill a row of 128.
        ("f32[64,16]{0,1:T(8,128)S(1)} copy(%narrow)", 64 * 128 * 4),
        ("f32[8,16]{1,0:T(8,128)S(1)} slice(%narrow), slice={[0:8], [0:16]}", 8 * 128 * 4),
        # What is updated in place is written where it is updated, wherever the new values come from.
        (f"{WHOLE_TEXT} dynamic-update-slice(%w, %row, %i, %i)", 512),
        (f"{ON_CHIP_TEXT} dynamic-update-slice(%here, %row, %i, %i)", 0),
        # Parts that were fetched into one place are one array there.
        (f'{ON_CHIP_TEXT} custom-call(%a, %b, %c, %d), custom_call_target="ConcatBitcast"', 0),
        (f'{WHOLE_TEXT} custom-call(%w), custom_call_target="ConcatBitcast"', 0),
        (f'{WHOLE_TEXT} custom-call(%w), custom_call_target="Other"', 2 * WHOLE),
    ],
)
def test_bytes_of_an_instruction(line: str, num_bytes: int) -> None:
    module = Module(TEXT.replace("@LINE@", f"ROOT %it = {line}"))
    main = module.computations["main"]
    assert hbm_bytes(module, main, main.by_name["it"]) == num_bytes
