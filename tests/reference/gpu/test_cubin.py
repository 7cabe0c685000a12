"""Loops in machine code are found, and spills in them. Listings as nvdisasm prints them."""

import pytest

from tests.reference.gpu.cubin import LOCAL, PRODUCT, Flow

STORE, LOAD = "STL.64 [R1+0x8], R20", "@!P2 LDL.LU R20, [R1+0x8]"
PRODUCTS = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"


def flow(*lines: str) -> Flow:
    """Lines that end in a colon are labels, the others instructions."""
    listing = [
        line if line.endswith(":") else f"        /*{16 * place:04x}*/                   {line} ;"
        for place, line in enumerate(lines)
    ]
    return Flow.of("\n".join(["\t.target\tsm_90a", ".text.kernel:", *listing]))


@pytest.mark.parametrize("back", ["@!P1 BRA `(.L_x_1)", "BRA.U !UP0, `(.L_x_1)"])
def test_only_what_lies_in_a_loop_is_repeated(back: str) -> None:
    found = flow(STORE, ".L_x_1:", LOAD, PRODUCTS, back, LOAD, "EXIT")
    assert found.repeated(LOCAL) == [LOAD]
    assert found.repeated(PRODUCT) == [PRODUCTS]
    found = flow(STORE, ".L_x_1:", PRODUCTS, back, LOAD, "EXIT", ".L_x_2:", "BRA `(.L_x_2)")
    assert found.repeated(LOCAL) == []
    assert found.repeated(PRODUCT) == [PRODUCTS]


def test_a_part_of_a_loop_behind_the_end_belongs_to_it() -> None:
    """And a wait moved there that returns to straight code makes no loop of what lies between."""
    wait = [".L_x_3:", "@!P0 BRA `(.L_x_3)", "BRA `(.L_x_2)"]
    assert not flow("@!P0 BRA `(.L_x_3)", ".L_x_2:", STORE, "EXIT", *wait).repeated(LOCAL)
    loop = [".L_x_1:", "@P0 BRA `(.L_x_3)", ".L_x_2:", "@P1 BRA `(.L_x_1)", "EXIT"]
    assert flow(*loop, ".L_x_3:", STORE, "BRA `(.L_x_2)").repeated(LOCAL) == [STORE]


def test_calls_of_labels_are_branches_and_functions_count_as_repeated() -> None:
    far = ["@!P3 CALL.REL.NOINC `(.L_x_0)", "BRA `(.L_x_1)", ".L_x_0:", LOAD, "EXIT"]
    assert flow(".L_x_1:", PRODUCTS, *far).repeated(LOCAL) == []
    function = ["$__internal_0_$divide:", STORE, "RET.REL.NODEC R2 `(kernel)"]
    assert flow("CALL.REL.NOINC `($__internal_0_$divide)", "EXIT", *function).repeated(LOCAL)


def test_a_jump_to_an_unknown_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot follow 'BRX R2 -0x10'"):
        flow("BRX R2 -0x10", "EXIT")
