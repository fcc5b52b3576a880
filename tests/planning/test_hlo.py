"""Cycles, loops and collectives of compiled programs: one by hand, and programs that XLA compiles for eight devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmm.config import MeshConfig
from jaxmm.planning.hlo import Collective, Kernel, Program
from jaxmm.sharding import make_mesh

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
TEXT = """HloModule step, is_scheduled=true

%inner (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0:T(128)} parameter(0)
  ROOT %n = f32[8]{0:T(128)} negate(%p.1), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %c = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %more = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(8,128)S(1)}) parameter(0)
  %x = f32[8]{0:T(128)} fusion(%b), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/a/b/c"}, backend_config={"window_config":{"estimated_cycles":"50"}}
  %r = bf16[6,2]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  %g = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %d = f32[16]{0} all-gather-done(%g)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%x)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %w = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%p), condition=%condition, body=%body
  %s = f32[2]{0} reduce-scatter(%w), channel_id=3, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
  %attention_of_2_heads.3 = bf16[4,9,16]{2,1,0} custom-call(%p, %p), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[4,9,16]{2,1,0}, bf16[4,9,16]{2,1,0}}, metadata={op_name="x"}
  ROOT %m = f32[8]{0:T(128)} collective-permute(%s), channel_id=4, source_target_pairs={{0,4},{4,0}}, backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_runs_and_a_fusion_once():
    assert Program(TEXT).cycles == 3 * 50 + 7


def test_collectives_by_kind_and_axis():
    assert Program(TEXT).collectives(MESH) == [
        Collective("all-gather", ("data",), 3, 3 * 16 * 4),
        Collective("all-reduce", ("fsdp",), 3, 3 * 12 * 2),
        Collective("collective-permute", ("data",), 1, 8 * 4),
        Collective("reduce-scatter", ("data",), 1, 2 * 2 * 4),
    ]


@pytest.mark.parametrize(("kind", "share"), [("all-reduce", 1.5), ("all-gather", 0.75), ("collective-permute", 1.0)])
def test_bytes_that_a_device_sends(kind, share):
    assert Collective(kind, ("fsdp",), 1, 1000).sent_bytes(MESH) == 1000 * share


def test_kernels():
    shape = "bf16", (4, 9, 16)
    assert Program(TEXT).kernels == {Kernel("attention_of_2_heads", (shape, shape)): 1}


def test_a_loop_of_unknown_trip_count_counts_once():
    assert Program(TEXT.replace("constant(3)", "parameter(1)")).cycles == 57
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert Program(known).cycles == 257


@pytest.mark.parametrize("axes", [(2, 4, 1), (8, 1, 1)])
def test_programs_that_xla_compiled(axes):
    """A kernel sharded over fsdp is gathered; a gradient is summed over all shards of the batch."""
    mesh = make_mesh(MeshConfig(data=axes[0], fsdp=axes[1], tensor=axes[2]))
    rows, columns = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp")))

    def step(x, kernel):
        y = jax.lax.scan(lambda y, _: (jnp.tanh(y @ kernel), None), x, length=5)[0]
        return jax.lax.with_sharding_constraint(y.T @ x, columns)

    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
              for shape, sharding in (((64, 32), rows), ((32, 32), columns))]
    program = Program(jax.jit(step).lower(*inputs).compile().as_text())
    collectives = program.collectives(mesh.shape)
    gathered = sum(row.bytes for row in collectives if row.kind == "all-gather" and row.axes == ("fsdp",))
    assert gathered in ((32 * 32 * 4, 5 * 32 * 32 * 4) if axes[1] > 1 else (0,))      # outside the loop, or inside
    batch = tuple(axis for axis, size in zip(mesh.shape, axes, strict=True) if size > 1 and axis != "tensor")
    summed = {axis for row in collectives if row.kind in ("all-reduce", "reduce-scatter") for axis in row.axes}
    assert summed == set(batch)
