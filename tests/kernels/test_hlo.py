"""Launches of a compiled module, counted on a text by hand and on a real one."""

import jax
import jax.numpy as jnp

from trix_kernels.hlo import Launch, launches, while_loops

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
    assert launches(TEXT) == [
        Launch("copy", ""),
        Launch("fusion", ""),
        Launch("fusion", "jit(step)/loop/mul"),
        Launch("custom-call", "jit(step)/dot"),
    ]
    assert while_loops(TEXT) == 1


def test_loops_of_what_jax_compiles_are_found_and_nested_ones_too():
    def inner(_, x):
        return jax.lax.fori_loop(0, x[0].astype(int), lambda _, x: jnp.sin(x), x)

    loops = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, inner, x))
    text = loops.lower(jnp.ones(3), 5).compile().as_text()
    assert while_loops(text) == 2
    assert any("sin" in launch.name for launch in launches(text))
    straight = jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()
    assert while_loops(straight) == 0
