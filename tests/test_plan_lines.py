"""The work of a compiled program by source line: its sums are the program's cost, and
products alone need bytes.
"""

import jax
import jax.numpy as jnp
import pytest
from hlo_text import MODULE

from jaxreason.chips import CHIPS
from jaxreason.plan import hlo, lines, report, traffic

CHIP = CHIPS["v5e"]
TABLES = """
FileNames
1 "/home/me/site-packages/jax/_src/lax.py"
2 "/home/me/jaxreason/model/layers.py"

FunctionNames
1 "dot"
2 "Projection.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=61 end_line=61 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}

"""


def summed(found, field):
    return sum(getattr(line, field) for line in found)


def assert_same_sums(text, **sizes):
    program, found = hlo.program_cost(text, **sizes), lines.lines_of(text, **sizes)
    assert summed(found, "flops") == pytest.approx(program.flops)
    assert summed(found, "bytes") == pytest.approx(program.bytes)
    assert summed(found, "sent") == pytest.approx(program.sent_bytes)
    merged = lines.by_source(found)
    assert summed(merged, "bytes") == pytest.approx(program.bytes)
    assert len({(line.source, line.op) for line in merged}) == len(merged)
    return found


def test_lines_of_a_loop_by_hand():
    found = {line.op.split()[0]: line for line in assert_same_sums(MODULE.replace("LIMIT", "7"), devices=8)}
    product, reduction = found["dot"], found["all-reduce"]
    assert (product.times, product.flops) == (5, 5 * 2 * 8 * 16 * 16)
    assert product.needed == product.bytes == 5 * 4 * 2 * 8 * 16, "the weights are in vector memory"
    assert reduction.needed == 0
    assert reduction.waits
    assert reduction.sent == pytest.approx(5 * 4 * 8 * 16 * 2 * 3 / 4)
    # In turn: memory of the product, memory and network of the reduction, the rest.
    limits = lines.bounds(list(found.values()), CHIP)
    moved = summed(found.values(), "bytes") / CHIP.hbm_bytes_per_s
    assert limits.in_turn_s == pytest.approx(moved + reduction.sent / CHIP.ici_bytes_per_s)
    assert limits.together_s == pytest.approx(max(moved, reduction.sent / CHIP.ici_bytes_per_s))
    assert limits.waiting_bytes == reduction.sent


def test_lines_of_a_compiled_program():
    def f(x, w):
        def step(x, w):
            return jnp.tanh(x @ w), jnp.sum(x)

        return jax.lax.scan(step, x, w)

    compiled = (
        jax.jit(jax.grad(lambda *a: jnp.sum(f(*a)[0]), argnums=1)).lower(jnp.ones((16, 32)), jnp.ones((5, 32, 32))).compile()
    )
    found = assert_same_sums(compiled.as_text())
    assert summed(found, "flops") == 5 * 3 * 2 * 16 * 32 * 32, "one product forward, two backward"
    assert 0 < summed(found, "needed") <= summed(found, "bytes")


def test_a_collective_that_several_fusions_name_is_counted_once():
    fused = """%part.NUMBER (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%x), channel_id=7, replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
}
"""
    entry = """ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %a = f32[8]{0} fusion(%x), kind=kCustom, calls=%part.1
  ROOT %b = f32[8]{0} fusion(%x), kind=kCustom, calls=%part.2
}
"""
    found = assert_same_sums("".join(fused.replace("NUMBER", str(n)) for n in (1, 2)) + entry)
    assert not any(line.waits for line in found), "it runs beside them"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ('metadata={op_name="jit(f)/dot_general" stack_frame_id=2}', ("jaxreason/model/layers.py:61 __call__", "dot_general")),
        ('metadata={op_name="jit(f)/add" source_file="/a/jaxreason/logp.py" source_line=9}', ("jaxreason/logp.py:9", "add")),
        ('metadata={op_name="jit(f)/add"}', (lines.UNKNOWN, "add")),
        ("", (lines.UNKNOWN, "multiply")),
    ],
)
def test_the_source_is_the_innermost_line_of_our_own(metadata, expected):
    body = f"  %x = f32[4]{{0}} parameter(0)\n  ROOT %y = f32[4]{{0}} multiply(%x, %x), {metadata}\n"
    text = f"{TABLES}ENTRY %main (x: f32[4]) -> f32[4] {{\n{body}}}\n"
    computations, entry = hlo.parse(text)
    assert lines.Sources(text).of(computations[entry]["y"]) == expected


def test_flops_of_kernels_are_spread_over_them():
    text = """ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %a = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %b = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
    found = lines.lines_of(text, kernel_flops=28.0)
    assert [line.flops for line in found] == [12.0, 16.0], "by their bytes: 48 and 64"
    assert [line.needed for line in found] == [48.0, 64.0]


def test_another_program_is_counted_in_the_same_way(tmp_path, capsys):
    path = tmp_path / "other.hlo"
    path.write_text(MODULE.replace("LIMIT", "7"))
    told = report.compare(str(path), "v5e:2x4", None)
    assert told == traffic.describe(lines.lines_of(path.read_text(), devices=8), CHIP, 0.0, 0.0)
    assert "mfu_in_turn" not in told
    report.show_compared(str(path), told)
    shown = capsys.readouterr().out
    assert "of products" in shown
    assert not any(word in shown for word in ("?", "kB per token", "MFU")), "no column for what is not known"
    ours = {"programs": {"train step": {"model_flops": 1e6, "tokens": 2.0, "kernel_flops": 0.0}}, "microbatches": 1}
    told = report.compare(str(path), "v5e:2x4", ours)
    assert told["mfu_in_turn"] == pytest.approx(1e6 / CHIP.flops_per_s / told["in_turn_s"])
    report.show_compared(str(path), told)
    shown = capsys.readouterr().out
    assert "kB per token" in shown
    assert "MFU at most" in shown
    path.write_text("HloModule x, entry_computation_layout={}")
    with pytest.raises(ValueError, match=r"other\.hlo, which is no compiled HLO module; allowed"):
        report.compare(str(path), "v5e:2x4", None)
    with pytest.raises(ValueError, match="unknown topology 'v5e:2x'"):
        report.compare(str(path), "v5e:2x", None)
