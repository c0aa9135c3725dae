"""What separates the TPU compiler's account of a program from what the devices here take: `partinf.proof.pace`, measured.

Three chains, of which each link waits for the one before: operations that pass over next to nothing, transpositions, and products
whose matrix lies on the chip already. A long chain less a short one gives the time of a link, and their compiled texts the cycles that the
compiler expects of it. Compilers for CPUs and GPUs state no cycles, so there only the least operation's time is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from partinf.foundation.compiler_text import estimated_cycles
from partinf.hardware.rates import PaceRates
from partinf.measure.timing import Call, Timing
from partinf.partition.sharding import WHOLE, whole

Link = Callable[[jax.Array, jax.Array], jax.Array]

_LINKS = (4, 20)
_SMALL, _MOVING, _PRODUCT = "small operations", "transpositions", "products on the chip"
# Sides of what is transposed and multiplied, on a CPU and on an accelerator.
_SIDES = {True: (256, 128), False: (512, 2048)}


class PaceCalls:
    """The chains, compiled.

    Attributes:
        calls: for `partinf.measure.timing.alternate`.
    """

    def __init__(self, mesh: Mesh, virtual: bool) -> None:
        moved, multiplied = _SIDES[virtual]
        self.calls: dict[str, Call] = {}
        self._cycles: dict[str, int] = {}
        matrix = jnp.full((multiplied, multiplied), 1 / multiplied, jnp.bfloat16)
        links: dict[str, tuple[Link, jax.Array]] = {
            _SMALL: (lambda x, _: x * 1.5 - 0.5, jnp.ones((8, 128), jnp.float32)),
            _MOVING: (lambda x, _: x.T, jnp.ones((moved, moved), jnp.float32)),
            _PRODUCT: (jnp.dot, jnp.ones_like(matrix)),
        }
        for name, (link, start) in links.items():
            for count in _LINKS:
                self._add(f"{count} {name}", mesh, link, (start, matrix), count)

    def _add(self, name: str, mesh: Mesh, link: Link, given: tuple[jax.Array, jax.Array], count: int) -> None:
        def chain(x: jax.Array, matrix: jax.Array) -> jax.Array:
            for _ in range(count):
                x = lax.optimization_barrier(link(x, matrix))
            return x

        held = jax.device_put(given, whole(mesh))
        run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=WHOLE, out_specs=WHOLE, check_vma=False))
        compiled = run.lower(*held).compile()
        self._cycles[name] = estimated_cycles(str(compiled.as_text()))
        self.calls[name] = lambda: jax.block_until_ready(compiled(*held))

    def rates(self, timings: Mapping[str, Timing], clock: float) -> PaceRates:
        """What the times of these calls say. `clock`: of the compiler's cycles, 0 where it is not known."""
        return PaceRates(
            product_share=self._share(_PRODUCT, timings, clock),
            moving_share=self._share(_MOVING, timings, clock),
            least_seconds=self._nominal(_SMALL, clock),
            small_seconds=_each({name: timing.seconds for name, timing in timings.items()}, _SMALL),
        )

    def _nominal(self, name: str, clock: float) -> float:
        return _each(self._cycles, name) / clock if clock else 0.0

    def _share(self, name: str, timings: Mapping[str, Timing], clock: float) -> float:
        """Of the compiler's time of a link, what it takes: no more than all of it, and 0 where the compiler says nothing."""
        nominal, took = self._nominal(name, clock), _each({key: timing.seconds for key, timing in timings.items()}, name)
        return min(1.0, took / nominal) if nominal else 0.0


def _each(values: Mapping[str, float], name: str) -> float:
    """Of one link, from a long chain and a short one; at least 0."""
    short, long = (values[f"{count} {name}"] for count in _LINKS)
    return max(long - short, 0.0) / (_LINKS[1] - _LINKS[0])
