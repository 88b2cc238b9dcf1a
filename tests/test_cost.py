"""Costs: compiled programs walked with their loops, compared with XLA's own count and
the formulas; bytes sent and moved, by hand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from hlo_text import MODULE

from jaxreason import batching, build, cost
from jaxreason.learner import compile_train_step, new_state
from jaxreason.model import ModelConfig, transformer
from jaxreason.model.config import Lora, sized
from jaxreason.objectives import dapo
from jaxreason.plan import chips, hlo

SHAPE = ModelConfig(vocab_size=96, width=64, layers=3, heads=4, kv_heads=2, head_size=32, feed_forward=128, scan_layers=True)
B, T = 8, 32
OPTIMIZER = optax.sgd(1e-2)


def test_a_program_by_hand():
    found = hlo.program_cost(MODULE.replace("LIMIT", "7"))
    assert found.loops == (5,)  # from 2 to 7
    assert found.unknown_loops == 0
    assert found.flops == 5 * 2 * 8 * 16 * 16
    # In a ring of four each device sends three quarters of the whole, and once more to
    # bring the sums back.
    assert found.sent == {("all-reduce", 4): (5 * 2 * 3 / 4 * 8 * 16 * 4, 5)}
    # The update in place reads a row and an index and writes a row; in the loop the
    # weights lie in vector memory, the product reads and writes 512 bytes, as the
    # collective does, and the counter is 4 bytes in, 4 bytes of a constant and 4 out.
    assert found.bytes == (64 + 4 + 64) + 5 * (2 * 512 + 2 * 512 + 3 * 4)


FUSIONS = """HloModule fusions, is_scheduled=true

%passed (p: f32[16,16]) -> f32[16,16] {
  %p = f32[16,16]{1,0} parameter(0)
  ROOT %same = f32[16,16]{1,0} bitcast(%p)
}

%product (x: f32[8,16], w: f32[16,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,16]{1,0} parameter(1)
  %inner = f32[16,16]{1,0} fusion(%w), kind=kLoop, calls=%passed
  ROOT %y = f32[8,16]{1,0} USE
}

ENTRY %main (x: f32[8,16], w: f32[16,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,16]{1,0} parameter(1)
  %room = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %y = f32[8,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
}
"""


@pytest.mark.parametrize(
    ("use", "read"),
    [
        ("dot(%x, %inner), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 16 * 16 + 8 * 16),  # a weight is read
        ("dynamic-slice(%inner, %x, %x), dynamic_slice_sizes={8,16}", 8 * 16 + 8 * 16),  # a part of it
        ("add(%x, %x)", 8 * 16),  # nothing of it
    ],
)
def test_users_of_a_nested_fusion_read_the_operand_that_it_passes_on(use, read):
    """A buffer that is only allocated is not a write."""
    program = hlo.program_cost(FUSIONS.replace("USE", use))
    assert program.bytes == 4 * (read + 8 * 16)


def test_a_fusion_that_passes_its_operand_out_reads_it():
    copies = FUSIONS.replace("calls=%product", "calls=%passed").replace("fusion(%x, %w), kind=kOutput", "fusion(%w), kind=kLoop")
    assert hlo.program_cost(copies.replace("USE", "add(%x, %x)")).bytes == 4 * (16 * 16 + 8 * 16)


HBM, VECTOR = "f32[16,16]{1,0}", "f32[16,16]{1,0:S(1)}"
PART, PART_THERE = "f32[8,16]{1,0}", "f32[8,16]{1,0:S(1)}"
UPDATE = "dynamic-update-slice(%whole, %part, %at, %at)"
PLACES = """HloModule places, is_scheduled=true

ENTRY %main (whole: f32[16,16], part: f32[8,16], at: s32[]) -> f32[8,16] {{
  %whole = {whole} parameter(0)
  %part = {part} parameter(1)
  %at = s32[] parameter(2)
  ROOT %y = {made} {op}
}}
"""


@pytest.mark.parametrize(
    ("whole", "part", "made", "op", "parts"),
    [
        (HBM, PART, f"(({HBM}), {PART_THERE}, s32[])", "slice-start(%whole), slice={[0:8], [0:16]}", 1),  # a prefetched weight
        (HBM, PART, f"(({HBM}), {PART}, s32[])", "slice-start(%whole), slice={[0:8], [0:16]}", 2),
        (VECTOR, PART, f"(({VECTOR}), {PART}, s32[])", "slice-start(%whole), slice={[0:8], [0:16]}", 1),
        (HBM, PART, PART_THERE, "slice(%whole), slice={[0:8], [0:16]}", 1),
        (VECTOR, PART, PART, "dynamic-slice(%whole, %at, %at), dynamic_slice_sizes={8,16}", 1),
        (VECTOR, PART, PART_THERE, "slice(%whole), slice={[0:8], [0:16]}", 0),
        (HBM, PART, PART, "slice(%whole), slice={[0:8], [0:16]}", 2),
        (HBM, PART, HBM, UPDATE, 2),
        (HBM, PART_THERE, HBM, UPDATE, 1),
        (VECTOR, PART, VECTOR, UPDATE, 1),
        (VECTOR, PART_THERE, VECTOR, UPDATE, 0),
    ],
)
def test_copies_count_once_for_each_end_in_hbm(whole, part, made, op, parts):
    program = hlo.program_cost(PLACES.format(whole=whole, part=part, made=made, op=op))
    assert program.bytes == parts * 4 * 8 * 16


def test_a_loop_of_unknown_length_runs_as_often_as_one_says():
    text = MODULE.replace("%limit = s32[] constant(LIMIT)", "%limit = s32[] get-tuple-element(%state), index=0")
    for trips in (1, 9):
        found = hlo.program_cost(text, unknown_trips=trips)
        assert (found.loops, found.unknown_loops, found.flops) == ((trips,), 1, trips * 2 * 8 * 16 * 16)


@pytest.mark.parametrize(("step", "trips"), [(1, 5), (2, 3), (5, 1), (6, 1)])
def test_a_loop_that_was_unrolled_counts_in_larger_steps(step, trips):
    """A TPU's compiler unrolls a product that is sent around a ring while it is
    computed.
    """
    text = MODULE.replace("LIMIT", "7").replace("%one = s32[] constant(1)", f"%one = s32[]{{:T(128)}} constant({step})")
    assert hlo.program_cost(text).loops == (trips,)


def test_a_part_of_a_chain_of_fusions_is_the_same_collective():
    fused = """%part.NUMBER (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%x), channel_id=CHANNEL, replica_groups={{0,1}}, frontend_attributes={chain_id="0"}
}
"""
    entry = """ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %a = f32[8]{0} fusion(%x), kind=kCustom, calls=%part.1
  ROOT %b = f32[8]{0} fusion(%x), kind=kCustom, calls=%part.2
}
"""

    def sent(*channels):
        parts = "".join(fused.replace("NUMBER", str(n)).replace("CHANNEL", str(c)) for n, c in enumerate(channels, 1))
        return hlo.program_cost(parts + entry).sent

    assert sent(7, 7) == {("all-gather", 2): (16, 1)}
    assert sent(7, 8) == {("all-gather", 2): (32, 2)}


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}", 3),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0','axis_2'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", 2),
        ("replica_groups={}", 16),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_devices_of_a_collectives_group_are_counted(attributes, size):
    assert hlo.group_size(attributes, 16) == size


def test_products_written_as_convolutions():
    def flops(line, **shapes):
        computation = {name: hlo.Instruction(name, shape, "parameter", (), "", "0", False) for name, shape in shapes.items()}
        parsed, _ = hlo.parse(f"ENTRY %main (x: f32[]) -> f32[] {{\n  {line}\n}}\n")
        return hlo.product_flops(next(iter(parsed["main"].values())), computation)

    plain = "ROOT %c = bf16[4,384,128]{2,1,0} convolution(%x, %w), window={size=1}, dim_labels=0bf_io0->0bf"
    assert flops(plain, x="bf16[4,384,256]", w="bf16[256,128,1]") == 2 * 4 * 384 * 256 * 128
    # Two matrices of a batch stand in the axis of the window, with gaps between: of the
    # four pairs two meet.
    batch = "ROOT %c = f32[2,768,384]{2,1,0} convolution(%x, %w), window={size=2 stride=1 pad=0_0 lhs_dilate=2}, "
    batch += "dim_labels=0bf_0io->0bf"
    assert flops(batch, x="bf16[2,768,128]", w="bf16[2,128,384]") == 2 * 2 * 768 * 128 * 384
    summed = "ROOT %c = f32[256,128,1]{1,0,2} convolution(%x, %w), window={size=4}, dim_labels=0fb_0io->bf0"
    assert flops(summed, x="f32[4,384,256]", w="f32[4,384,128]") == 2 * 4 * 384 * 256 * 128


# --- the ledger's formula beside XLA's own count ---


def shapes_of(name: str):
    """Return a model's shape with its layers in a row: of a scan XLA counts a single
    turn.
    """
    return dataclasses.replace(sized(name, **({"vocab_size": 40} if name == "tiny" else {})), scan_layers=False, remat="none")


def masked_flops(c, rows: int, length: int) -> float:
    """Count the FLOPs of attention scores that are computed, but masked because their
    keys are later tokens. XLA counts them; the ledger does not.
    """
    return 4.0 * c.layers * c.heads * c.head_size * rows * length * (cost.causal_keys(length) - (length + 1) / 2)


@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize("name", ["tiny", "smollm2_135m"])
def test_forward_flops_are_within_5_percent_of_xlas(name, tokens):
    """XLA also counts norms, softmax and rotations: 3 % of tiny's forward pass, 0.3 % of
    SmolLM2's.
    """
    shape, rows = shapes_of(name), 2
    model, ids = transformer(shape), jax.ShapeDtypeStruct((rows, tokens), jnp.int32)

    def forward(params, *tokens):
        return model.unembed(params, model.apply(params, *tokens)[0])

    found = jax.jit(forward).lower(jax.eval_shape(model.init, jax.random.key(0)), ids, ids, ids).cost_analysis()["flops"]
    formula = cost.forward_flops(shape, [(0, tokens)] * rows)
    assert formula + masked_flops(shape, rows, tokens) == pytest.approx(found, rel=0.05)
    assert formula + masked_flops(shape, rows, tokens) < found
    if name == "smollm2_135m":  # where little is masked, the ledger's own number is as near
        assert formula == pytest.approx(found, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "smollm2_135m"])
def test_train_flops_are_within_5_percent_of_xlas(name):
    """The log-probs of two chunks of tokens are computed in a loop, of which XLA counts
    a single turn; the gradient of the first chunk is outside its loop.
    """
    shape, rows, tokens = shapes_of(name), 2, 64
    found = compiled_train_step(shape, tokens=tokens, rows=rows).cost_analysis()["flops"]
    found += 2.0 * shape.width * shape.vocab_size * rows * tokens / 2  # the other turn
    formula = 3 * (cost.forward_flops(shape, [(0, tokens)] * rows) + masked_flops(shape, rows, tokens))
    assert formula == pytest.approx(found, rel=0.05)
    assert formula < found


def compiled_train_step(shape, microbatches=1, tokens=T, rows=B):
    model = transformer(shape)
    state = jax.eval_shape(lambda: new_state(model.init(jax.random.key(0)), OPTIMIZER))
    step = compile_train_step(model, dapo(), OPTIMIZER, microbatches=microbatches)
    # As a user's programs: without fusion a scatter is a loop, and what it moves is
    # counted in each turn.
    return step.lower(state, batching.empty(rows, tokens)).compile(compiler_options={"xla_cpu_use_fusion_emitters": True})


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [T, 300])  # attention in one part and in two
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"remat": "full"},
        {"remat": "dots", "tied_embeddings": True},
        {"lora": Lora(rank=4, targets=("q", "k", "v", "o", "gate", "up", "down"))},
    ],
    ids=str,
)
def test_a_train_step_computes_what_the_formula_says(fields, tokens):
    shape = dataclasses.replace(SHAPE, **fields)
    found = hlo.program_cost(compiled_train_step(shape, 4, tokens).as_text(), unknown_trips=4)
    assert found.unknown_loops == 1  # that over the micro-batches in use
    assert found.flops == pytest.approx(cost.train_flops(shape, B, tokens, remade=False), rel=0.02)


@pytest.mark.slow
def test_the_walk_agrees_with_xla_where_nothing_loops_and_corrects_it_where_something_does():
    flat, looped = (compiled_train_step(dataclasses.replace(SHAPE, scan_layers=scan)) for scan in (False, True))
    walked = hlo.program_cost(flat.as_text())
    assert walked.loops == (2,)  # logits come in two chunks at least; XLA counts one of them
    assert walked.flops == pytest.approx(flat.cost_analysis()["flops"], rel=0.1)  # it counts norms and softmax too
    assert walked.bytes == pytest.approx(flat.cost_analysis()["bytes accessed"], rel=0.25)
    again = hlo.program_cost(looped.as_text())
    assert sorted(again.loops) == [2, SHAPE.layers, SHAPE.layers]
    assert again.flops == walked.flops
    assert looped.cost_analysis()["flops"] < 0.6 * walked.flops


def test_a_conditional_costs_what_its_costlier_branch_does():
    def some(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: jnp.zeros_like(x))

    compiled = jax.jit(some).lower(jax.ShapeDtypeStruct((32, 32), jnp.float32)).compile()
    assert hlo.program_cost(compiled.as_text()).flops == 2 * 32**3


def test_the_roofline_names_what_takes_longest():
    chip = chips.CHIPS["v5e"]
    for name, program in {
        "compute": hlo.Program(chip.flops_per_s, 0, {}),
        "HBM": hlo.Program(1, chip.hbm_bytes_per_s, {("all-gather", 2): (1.0, 1)}),
        "network": hlo.Program(1, 1, {("all-gather", 2): (chip.ici_bytes_per_s, 3)}),
    }.items():
        line = chips.roofline(program, chip)
        assert (line.bound, line.seconds) == (name, pytest.approx(1))


def test_topologies_are_named_and_counted():
    assert "v5e:4x8" in chips.topology_names()
    assert [chips.chips_of(name) for name in ("v5e:1x1", "v5e:4x8", "v5p:2x2x4")] == [1, 32, 16]


# --- attempts behind one copy of their prompt ---


def test_attempts_share_a_prompt_where_that_is_less_work():
    shape, choices = sized("smollm2_135m"), (1, 2, 4, 8)
    assert cost.attempts_behind_a_prompt(shape, choices, 16, 1024) == 1  # most scores of a shared prompt would be masked
    assert cost.attempts_behind_a_prompt(shape, choices, 64, 64) == 4
    assert cost.attempts_behind_a_prompt(shape, choices, 1024, 8) == 8
    assert cost.attempts_behind_a_prompt(shape, (1, 2), 1024, 8) == 2


def test_rollouts_per_prompt_of_a_config_is_used_or_refused():
    shape, how = sized("smollm2_135m"), {"group": 8, "rows": 32, "longest_prompt": 2048, "completion": 8}
    choose = functools.partial(build.choose_rollouts_per_prompt, **how)
    assert choose(None, shape, multiple=4) == 8
    assert choose(None, shape, multiple=16) == 2  # as many as leave rows for all devices and micro-batches
    assert choose(None, shape, multiple=5) == 1  # another function reports the rows
    assert choose(4, shape, multiple=16) == 4
    flash = dataclasses.replace(shape, attention="splash")
    assert choose(None, flash, multiple=4) == choose(1, flash, multiple=4) == 1
    with pytest.raises(ValueError, match=r"rollouts_per_prompt got 2 with attention='splash'; allowed: 1, or attention='xla'"):
        choose(2, flash, multiple=4)
    for asked in (0, 3, 16):
        with pytest.raises(ValueError, match=rf"rollouts_per_prompt got {asked}; allowed: a divisor of group=8"):
            choose(asked, shape, multiple=4)
