"""One layer of a mixture of experts that others wrote and traced: jax-llm-examples' DeepSeek R1 in int8 on 64 chips of v5e.

    python -m experiments.timed_programs.deepseek CHECKOUT TEXTS     # a minute on one core, no TPU; writes deepseek.json

Its README has the profiler trace of a decode step of 8 sequences with room for 2048 positions, in which one layer with experts takes 401
us. The step is compiled with one such layer and with three, and half of the difference goes with the trace. The kernel of its experts
reads the matrices of those that some row chose; the compiler says nothing of it. So there are two estimates: of a kernel that reads what is
chosen if all experts are as likely, and of one that reads all.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.results import write

BATCH, POSITIONS, LAYERS = 8, 2048, (1, 3)
EXPERTS, CHOSEN = 256, 8
TRACED = 401.0  # microseconds
# Rows 0 to 3 of the 8x8 torus are its first axis of experts, as devices are numbered row-major there as here.
SLICE, MESH = "v5e:8x8", "x0:4,x1:2,y:8"
KERNEL = "decode_ragged_dot"
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def compiled(checkout: str, layers: int) -> str:
    """The compiled text of a decode step with so many layers, all with experts. In a process of its own, which sets `_ENVIRONMENT`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    sys.path.insert(0, f"{checkout}/deepseek_r1_jax")
    from deepseek_r1_jax import model as theirs

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=SLICE).devices)
    mesh = Mesh(devices.reshape(1, 4, 16), ("x", "y", "z"))
    config = theirs.Config(num_layers=layers, first_k_dense=0, max_seq_len=POSITIONS, mesh=mesh)

    def described(tree: Any) -> Any:
        def one(info: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=theirs.logical_to_sharding(info.logical_axes, mesh, config.rules))

        return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, theirs.ArrayInfo))

    weights, cache = described(theirs.Weights.abstract(config)), described(theirs.KVCache.abstract(config, BATCH, POSITIONS))
    tokens = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    with mesh:
        step = jax.jit(lambda tokens, weights, cache: theirs.decode_step(tokens, weights, cache, config), donate_argnums=(2,))
        return str(step.lower(tokens, weights, cache).compile().as_text())


def walked(text: str, share: float) -> dict[str, float]:
    """Seconds of a step, and of its collectives and its kernel, which reads this share of the matrices that it is handed."""
    from partinf.cost.calibration import calibration_for
    from partinf.cost.pricing import Pricing
    from partinf.hardware.slices import parse_slice
    from partinf.proof.hlo import Instruction, Module
    from partinf.proof.pace import pace_of
    from partinf.proof.schedule import Reader
    from partinf.proof.traffic import kernel_bytes
    from partinf.proof.walk import KernelRun

    slice_ = parse_slice(SLICE, MESH)
    module, pace = Module(text), pace_of(slice_)
    blocks = {one.name: block for block in module.computations.values() for one in block.instructions}

    def kernel(instruction: Instruction, _: float) -> KernelRun:
        return KernelRun(share * kernel_bytes(blocks[instruction.name], instruction) / pace.byte_rate)

    network = Pricing(slice_, calibration_for(slice_.chip)).network
    schedule = Reader(module, slice_, network, kernels={KERNEL: kernel}, pace=pace).read()
    return {
        "layer": schedule.seconds,
        "collectives": sum(one.exposed_seconds for one in schedule.collectives),
        "kernel": sum(one.seconds for one in schedule.kernels.values()),
    }


def layer(texts: list[str], share: float) -> dict[str, float]:
    """Microseconds of one layer and its parts, from the texts of `LAYERS`."""
    less, more = (walked(text, share) for text in texts)
    return {name: round(1e6 * (more[name] - less[name]) / (LAYERS[1] - LAYERS[0]), 1) for name in more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--compile", type=int, metavar="LAYERS", help="compile one text, and nothing else")
    args = parser.parse_args()
    args.texts.mkdir(parents=True, exist_ok=True)
    if args.compile:
        with gzip.open(args.texts / f"deepseek_{args.compile}.txt.gz", "wt") as file:
            file.write(compiled(args.checkout, args.compile))
        return
    texts = []
    for layers in LAYERS:
        path = args.texts / f"deepseek_{layers}.txt.gz"
        if not path.is_file():
            command = (
                sys.executable,
                "-m",
                "experiments.timed_programs.deepseek",
                args.checkout,
                str(args.texts),
                "--compile",
                str(layers),
            )
            subprocess.run(command, check=True, env=os.environ | _ENVIRONMENT)
        texts.append(gzip.decompress(path.read_bytes()).decode())
    shares = {"chosen experts": 1 - (1 - 1 / EXPERTS) ** (BATCH * CHOSEN), "all experts": 1.0}
    found = {name: layer(texts, share) for name, share in shares.items()}
    for name, one in found.items():
        print(f"{name} read: {one['layer']} us, traced {TRACED}; of it collectives {one['collectives']}, the kernel {one['kernel']}")
    write(__file__, {"traced": TRACED, "estimates": found}, "deepseek.json")


if __name__ == "__main__":
    main()
