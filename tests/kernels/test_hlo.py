"""Launches of a compiled module, counted on a text by hand and on a real one."""

import jax
import jax.numpy as jnp

from trix_kernels.hlo import launches, while_loops

TEXT = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%p, %p)
}

%region_1 (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %i = s32[] get-tuple-element(%c), index=0
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/loop/mul"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %y)
}

%cond (c.1: (s32[], f32[8])) -> pred[] {
  %c.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] fusion(%c.1), kind=kLoop, calls=%fused
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %copy.1 = f32[8]{0} copy(%x.1)
  %t.1 = (s32[], f32[8]{0}) tuple(%zero, %copy.1)
  %w = (s32[], /*index=1*/f32[8]{0}) while(%t.1), condition=%cond, body=%region_1
  %z = f32[8]{0} get-tuple-element(%w), index=1
  ROOT %gemm = (f32[8]{0}, s8[64]{0}) custom-call(%z), custom_call_target="gemm", metadata={op_name="jit(step)/dot"}
}
"""


def test_launches_of_a_module_are_those_of_its_entry_and_its_loops():
    found = launches(TEXT)
    assert [(launch.op, launch.name) for launch in found] == [
        ("copy", ""),
        ("fusion", ""),
        ("fusion", "jit(step)/loop/mul"),
        ("custom-call", "jit(step)/dot"),
    ]
    assert while_loops(TEXT) == 1


def test_a_launch_is_started_as_often_as_its_loops_turn():
    assert [launch.turns for launch in launches(TEXT)] == [1] * 4
    told = ', backend_config={"known_trip_count":{"n":"5"}}'
    known = TEXT.replace("body=%region_1\n", f"body=%region_1{told}\n")
    assert [launch.turns for launch in launches(known)] == [1, 5, 5, 1]


def test_loops_of_what_jax_compiles_are_found_and_nested_ones_too():
    def inner(_, x):
        return jax.lax.fori_loop(0, x[0].astype(int), lambda _, x: jnp.sin(x), x)

    loops = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, inner, x))
    text = loops.lower(jnp.ones(3), 5).compile().as_text()
    assert while_loops(text) == 2
    assert any("sin" in launch.name for launch in launches(text))
    straight = jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()
    assert while_loops(straight) == 0


def test_bytes_and_products_of_a_launch_are_those_of_its_arrays():
    copy, condition, in_loop, gemm = launches(TEXT)
    assert (copy.bytes, in_loop.bytes) == (32 + 32, 32 + 32)
    assert condition.bytes == (4 + 32) + 1  # a tuple in, a truth value out
    assert gemm.bytes == 32 + (32 + 64)
    assert gemm.target == "gemm"
    fusions = """HloModule m

%dots (p: bf16[6,4], q: f32[5,4]) -> f32[6,5] {
  %p = bf16[6,4]{1,0} parameter(0)
  %q = f32[5,4]{1,0} parameter(1)
  %wide = f32[6,4]{1,0} convert(%p)
  %dot.1 = f32[6,5]{1,0} dot(%wide, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %dot.2 = f32[6,6]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%gathers (p: bf16[6,4], i: s32[9]) -> bf16[9,4] {
  %p = bf16[6,4]{1,0} parameter(0)
  %i = s32[9]{0} parameter(1)
  ROOT %g = bf16[9,4]{1,0} gather(%p, %i), offset_dims={1}, slice_sizes={1,4}
}

ENTRY %main (p: bf16[6,4], q: f32[5,4], i: s32[9]) -> bf16[9,4] {
  %p = bf16[6,4]{1,0} parameter(0)
  %q = f32[5,4]{1,0} parameter(1)
  %i = s32[9]{0} parameter(2)
  %a = (f32[6,5]{1,0}, (pred[3]{0}, f32[6,6]{1,0})) fusion(%p, %q, %p), kind=kOutput, calls=%dots
  ROOT %b = bf16[9,4]{1,0} fusion(%p, %i), kind=kLoop, calls=%gathers
}
"""
    dots, gathers = launches(fusions)
    assert dots.macs == 2 * 6 * 5 * 4 + 6 * 6 * 4
    assert dots.bytes == (48 + 80) + (120 + 3 + 144)
    assert gathers.macs == 0
    assert gathers.bytes == (48 + 36) + 72  # what is read again is in the cache
