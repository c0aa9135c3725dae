"""What each platform wants: one row per kind of device that JAX drives, and every choice that depends on it is a field of the row.

A platform is what `jax.Device.platform` and `Chip.family` name. Code asks for a field and never for a name, so that a further platform is
a further row. What differs from chip to chip stands in `hardware.toml`; what only the machine can say (flags of its CPU, memory of its
devices) is read where it is needed, under a rule that stands here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from partinf.foundation.errors import InvalidInput, nearest
from partinf.foundation.rounding import ceil_div, round_up


@dataclass(frozen=True)
class Tiles:
    """How much of attention is worked on at once (`partinf.transformer.kernels.tiles`).

    Attributes:
        keys: keys of one tile, of all lanes together when decoding. prompt_keys: the same for prompt tokens.
        scores: elements of a tile's scores at most, which bounds the prompt tokens of one tile.
        skip: skip fully masked tiles by a branch on the device; a GPU would wait for the host at each of them.
        fresh: prompts by the Pallas kernel for TPUs over fresh keys (`kernels.prompt`) where that takes them (`takes_prompts`).
        paged: decode by the Pallas kernel for TPUs (`kernels.paged_decode`) where that takes the pages. interpret: without a TPU.
        native: by the C++ kernels for CPUs (`kernels.cpu`), prompts too, where those take the pages.
    """

    keys: int
    prompt_keys: int
    scores: int
    skip: bool = True
    paged: bool = False
    fresh: bool = False
    interpret: bool = False
    native: bool = False

    def queries(self, heads: int) -> int:
        """Prompt tokens of one tile when a device has this many heads: a power of two, which prompts' buckets tend to be multiples of."""
        return 1 << max(self.scores // (heads * self.prompt_keys), 1).bit_length() - 1

    def count(self, tokens: int, keys: int, heads: int) -> tuple[int, int]:
        """Tiles of a device's prompt tokens, and pairs of one of them and a tile of their keys."""
        queries = ceil_div(tokens, min(self.queries(heads), tokens)) if tokens else 0
        return queries, queries * ceil_div(keys, min(self.prompt_keys, keys)) if keys else 0

    def takes_prompts(self, heads: int, kv_heads: int, size: int) -> bool:
        """Whether the kernel for prompts takes so many heads of this size on a device: whole lanes, and groups of which a block has a tile
        of tokens."""
        return self.fresh and size % LANES == 0 and heads // max(kv_heads, 1) * KERNEL_TILE <= KERNEL_ROWS

    def kernel_pairs(self, tokens: int, slots: int, group: int, window: int) -> float:
        """Pairs of one of a device's prompt tokens and one of their keys for which the kernel makes scores, for `slots` prompts of one
        length that fill the tokens and heads in groups of so many."""
        return _kernel_pairs(tokens, max(slots, 1), group, window)

    def seen_shares(self, tokens: int, slots: int, heads: int) -> tuple[float, float]:
        """Of all pairs of tiles of a device's prompt tokens, the share that is not fully masked; and of all pairs of a tile of
        queries and a slot, the share that belong together. For `slots` prompts of one length that fill the tokens; 1 without skipping."""
        return _seen_shares(self, tokens, slots, heads)


LANES = 128  # of a tile of a TPU's memory: what the last dimension of an array is filled up to

# Of the kernel for prompts, whose heads fill lanes: rows of a block's tile, and rows (heads of a group times tokens) and keys of a block.
KERNEL_TILE, KERNEL_ROWS, KERNEL_KEYS = 16, 1024, 512

TILE_COLUMN = 32  # of the kernel that writes into the cache: bytes of a tile's column

_GATHERED = 1 << 16  # numbers that devices find for a norm, of all parts: as many cost their links less than the hops of a sum


def gathers_norm(numbers: int) -> bool:
    """Whether devices gather what each has found for a norm, so many numbers in all, rather than add it up on the way."""
    return numbers <= _GATHERED


def kernel_tokens(group: int) -> int:
    """Tokens of a block of the kernel for prompts, whose heads come in groups of so many."""
    return max(KERNEL_TILE, KERNEL_ROWS // group // KERNEL_TILE * KERNEL_TILE)


@functools.lru_cache(maxsize=4096)
def _kernel_pairs(tokens: int, slots: int, group: int, window: int) -> float:
    """As `Tiles.kernel_pairs`: a block of queries meets those blocks of keys that hold some of its prompts, up to its last token and from
    where its first one's window begins."""
    each, rows, pairs = max(tokens // slots, 1), min(kernel_tokens(group), tokens), 0
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens) - 1
        begin = max(first // each * each, first - window + 1)
        keys = (last // KERNEL_KEYS - begin // KERNEL_KEYS + 1) * KERNEL_KEYS
        pairs += (last - first + 1) * min(keys, tokens)
    return pairs


@functools.lru_cache(maxsize=4096)
def _seen_shares(tiles: Tiles, tokens: int, slots: int, heads: int) -> tuple[float, float]:
    """As `Tiles.seen_shares`: a walk over the tiles, remembered for the sizes that a search meets again and again."""
    if not tiles.skip or not tokens:
        return 1.0, 1.0
    each, length, size = max(tokens // max(slots, 1), 1), min(tiles.queries(heads), tokens), min(tiles.prompt_keys, tokens)
    seen = together = count = 0
    for first in range(0, tokens, length):
        last = min(first + length, tokens) - 1
        seen += last // size - (first // each * each) // size + 1
        together += last // each - first // each + 1
        count += 1
    return seen / (count * ceil_div(tokens, size)), together / (count * max(slots, 1))


class Form(StrEnum):
    """How a product x [T, E] · weights [F, E] is made where a machine may choose.

    XLA's own: as it is, or with bfloat16 widened to float32 first. The others are kernels of ours (`partinf.transformer.kernels.products`):
    a few rows meet weights along what is contracted, or panels of sixteen rows meet one number of the weights at a time, in float32 or in
    pairs of bfloat16; or a unit for matrices of bfloat16 does it (AMX). All add in float32.
    """

    XLA = "xla"
    WIDENED = "widened"
    ROWS = "rows"
    ROWS_OF_PAIRS = "rows of pairs"
    PANELS = "panels"
    PANELS_OF_PAIRS = "panels of pairs"
    TILES = "tiles"


ProductForms = Mapping[str, tuple[tuple[int, tuple[Form, ...]], ...]]
"""By type of weights: up to how many rows which form, the first of several that the machine has; the last line holds beyond its rows."""


_FEW_PROMPT_TOKENS = 512  # up to which a layer's code for them is as large


class Grouped(StrEnum):
    """How products of rows with the matrices of their experts are made. COMPILER: by `jax.lax.ragged_dot`, which XLA on CPU makes a product
    with all experts, and a TPU's compiler one with all of them laid out anew. TPU_KERNEL: `partinf.transformer.kernels.grouped_rows`.
    CPU_KERNEL: `cpu_experts.cc`, by `partinf.transformer.kernels.cpu`."""

    COMPILER = "compiler"
    TPU_KERNEL = "tpu-kernel"
    CPU_KERNEL = "cpu-kernel"


# Of the kernel for experts' products on TPUs: rows of a tile of memory, and elements of a matrix that are on the chip at once.
GROUPED_SUBLANES, GROUPED_BLOCK = 8, 1 << 21


def takes_matrices(each: int, outputs: int, inputs: int) -> bool:
    """Whether that kernel takes so many matrices [outputs, inputs] of each expert."""
    whole = all(size % GROUPED_SUBLANES == 0 for size in (outputs, inputs)) and max(outputs, inputs) >= LANES
    return whole and each * inputs * min(outputs, LANES) <= GROUPED_BLOCK


def lies_turned(outputs: int, inputs: int) -> bool:
    """Whether matrices [outputs, inputs] take less of a TPU's memory as [inputs, outputs]: they lie in whole tiles."""
    return _in_tiles(inputs, outputs) < _in_tiles(outputs, inputs)


def _in_tiles(rows: int, columns: int) -> int:
    return round_up(rows, GROUPED_SUBLANES) * round_up(columns, LANES)


@dataclass(frozen=True)
class Platform:
    """One row of the table.

    Attributes:
        virtual: devices are virtual: the host's CPU cut into as many as wanted, which share its cores and memory.
        device_files: patterns under / of the files by which a machine shows that it has such devices.
        coordinates: devices say where they lie in a torus, so that a mesh is laid out by place.
        partial_kinds: `device_kind` holds more than the chip's name, so that a part of it is enough to find the chip.
        default_type: storage type of weights unless another is given.
        slow_single_row: types of weights with which XLA makes a product with one row a sum over the columns of the matrix: several times
            as slow as with two rows on CPUs in bfloat16, twice as slow on TPUs, and four times as slow there in int8.
        bfloat16_as_bits: the cache stores bfloat16 as its bits: XLA on CPU widens a whole bfloat16 array, and narrows it again, for every
            scatter into it; bits it leaves.
        lanes: the last dimension of an array is stored in runs of so many numbers.
        tiles: of attention.
        unrolled_layers: layers of all programs of a plan together up to which they are compiled one by one, where a loop over them runs
            slower; each costs a compilation of its own. One program of each shipped model is within a TPU's bound, where a layer takes some
            tenfold of what a loop's share of it takes to compile, and not the six programs that serve Llama 3 8B.
        fetches_ahead: where layers are compiled one by one, the compiler prefetches the weights of later products during earlier work.
        products: forms of products where a machine may choose and did not measure; None where there is nothing to choose.
        wide_activation: nonlinearities are computed in float32, where that is one pass with what stands around it and bfloat16 is four.
        stacked_rotations: cosines and sines are stacked before the barrier that keeps them out of the loop over heads.
        multiplied_look_up: a table whose columns fill no whole lanes is read by a product, since a look-up would lay all of it out anew.
        default_program: name of the program for which layouts are chosen (`partinf.cost.program.PROGRAMS`): the one that runs.
        gathers_overlap_products: the compiler overlaps a gather of weights with products that do not wait for it.
        grouped: what multiplies rows with the matrices of their experts, where it takes them.
        ragged_exchange: the compiler takes `jax.lax.ragged_all_to_all`. XLA on CPU does not; on GPUs the step is untested with it.
        compiler_options: what is set for the compiler beyond its defaults.
        described: the compiler describes slices without any device (libtpu), so that a proof needs none.
        proof_environment: environment variables of the process that compiles a proof, in addition to those of every proof.
        host_code: compiled programs hold code for this machine's CPU, and depend on its flags.
        keeps_cached: a program that jax's compilation cache returned can be serialised again with its code.
        memory_share: share of the memory left by weights, programs and activations that becomes pages of the cache unless another
            is requested. Virtual devices share the machine with all else that runs on it, so it is a quarter there.
        code_bytes: what one compiled step takes besides its data: a round figure above what compilers named. layer_code_bytes: what every
            layer adds that is compiled one by one, for its decode rows, for up to 512 prompt tokens, and for each doubling of these.
    """

    name: str
    virtual: bool
    device_files: tuple[str, ...]
    coordinates: bool
    partial_kinds: bool
    default_type: str
    slow_single_row: frozenset[str]
    bfloat16_as_bits: bool
    lanes: int
    tiles: Tiles
    unrolled_layers: int
    fetches_ahead: bool
    products: ProductForms | None
    wide_activation: bool
    stacked_rotations: bool
    multiplied_look_up: bool
    default_program: str
    gathers_overlap_products: bool
    grouped: Grouped
    ragged_exchange: bool
    compiler_options: Mapping[str, str]
    described: bool
    proof_environment: Mapping[str, str]
    host_code: bool
    keeps_cached: bool
    memory_share: float
    code_bytes: int
    layer_code_bytes: tuple[int, int, int] = (0, 0, 0)

    def program_bytes(self, decode_rows: int, prompt_tokens: int, layers: int) -> int:
        """Code of one compiled step, of which so many layers are compiled one by one; tokens of one device's prompts."""
        decode, prompts, doubled = self.layer_code_bytes
        more = max(ceil_div(prompt_tokens, _FEW_PROMPT_TOKENS) - 1, 0).bit_length()
        return self.code_bytes + layers * (decode * (decode_rows > 0) + (prompts + doubled * more) * (prompt_tokens > 0))

    def unrolls(self, layers: int, stages: int) -> bool:
        """Whether layers are compiled one by one: as far as these devices prefer it for so many layers of all programs together. Stages
        share one program, so theirs are stacked."""
        return layers <= self.unrolled_layers and stages == 1

    def pins(self, each: int, outputs: int, inputs: int) -> bool:
        """Whether a device holds so many matrices [outputs, inputs] of each expert in the order in which a kernel reads them, one after the
        other. Left to itself the compiler chooses the order: of 128 experts whose matrices fill no whole tiles it made the experts
        the innermost dimension, and copied all of them for the kernel in every step."""
        return self.grouped is Grouped.TPU_KERNEL and takes_matrices(each, outputs, inputs)

    def held_entries(self, each: int, outputs: int, inputs: int) -> int:
        """Entries that they take in memory, with what fills their tiles up."""
        if not self.pins(each, outputs, inputs):
            return each * outputs * inputs
        return each * min(_in_tiles(outputs, inputs), _in_tiles(inputs, outputs))

    def joins_keys_and_values(self, head_dim: int) -> bool:
        """Whether the cache has keys and values of a head side by side, since alone they fill no whole lanes: the compiler lays heads of 64
        out with the pages innermost, and copies all of them for a kernel that reads a page as one run."""
        return self.lanes % (2 * head_dim) == 0

    def environment(self, num_devices: int) -> dict[str, str]:
        """The environment in which jax finds this platform alone: for virtual devices, so many of them.

        jax looks for every platform that is installed otherwise, and an installed libtpu would look for a TPU and complain.
        """
        return {"JAX_PLATFORMS": self.name} | ({"JAX_NUM_CPU_DEVICES": str(num_devices)} if self.virtual else {})


CPU = Platform(
    name="cpu",
    virtual=True,
    device_files=(),
    coordinates=False,
    partial_kinds=False,
    default_type="f32",
    slow_single_row=frozenset({"bf16", "int8"}),
    bfloat16_as_bits=True,
    lanes=1,
    tiles=Tiles(keys=64, prompt_keys=128, scores=1 << 18, native=True),  # a tile stays in the cache of a core
    unrolled_layers=1 << 30,
    fetches_ahead=False,
    products={
        "f32": ((8, (Form.ROWS,)), (64, (Form.PANELS, Form.XLA)), (512, (Form.XLA,))),
        "bf16": ((4, (Form.ROWS_OF_PAIRS,)), (64, (Form.TILES, Form.PANELS, Form.XLA)), (512, (Form.TILES, Form.WIDENED))),
        "int8": ((4, (Form.ROWS,)), (512, (Form.TILES, Form.PANELS, Form.XLA))),
    },
    wide_activation=True,
    stacked_rotations=True,
    multiplied_look_up=False,
    default_program="tiled",
    gathers_overlap_products=False,
    grouped=Grouped.CPU_KERNEL,
    ragged_exchange=False,
    compiler_options={},
    described=False,
    proof_environment={},
    host_code=True,
    keeps_cached=False,
    memory_share=0.25,
    code_bytes=4 << 20,
)
GPU = Platform(
    name="gpu",
    virtual=False,
    device_files=("dev/nvidia[0-9]*", "dev/kfd"),
    coordinates=False,
    partial_kinds=True,
    default_type="bf16",
    slow_single_row=frozenset(),
    bfloat16_as_bits=False,
    lanes=1,
    tiles=Tiles(keys=512, prompt_keys=512, scores=1 << 24, skip=False),
    unrolled_layers=0,
    fetches_ahead=False,
    products=None,
    wide_activation=False,
    stacked_rotations=False,
    multiplied_look_up=False,
    default_program="tiled",
    gathers_overlap_products=False,
    grouped=Grouped.COMPILER,
    ragged_exchange=False,
    compiler_options={},
    described=False,
    proof_environment={"JAX_PLATFORMS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    host_code=False,
    keeps_cached=True,
    memory_share=0.9,
    code_bytes=16 << 20,
)
TPU = Platform(
    name="tpu",
    virtual=False,
    device_files=("dev/accel*", "dev/vfio/[0-9]*"),
    coordinates=True,
    partial_kinds=False,
    default_type="bf16",
    slow_single_row=frozenset({"bf16", "int8", "f32"}),
    bfloat16_as_bits=False,
    lanes=128,
    tiles=Tiles(keys=1024, prompt_keys=1024, scores=1 << 22, paged=True, fresh=True),  # every tile costs microseconds, whatever its size
    unrolled_layers=160,
    fetches_ahead=True,
    products=None,
    wide_activation=False,
    stacked_rotations=False,
    multiplied_look_up=True,
    default_program="tiled",
    gathers_overlap_products=True,
    grouped=Grouped.TPU_KERNEL,
    ragged_exchange=True,
    # A TPU does one thing at a time unless its program says to start a collective, do what does not wait for it, and then end it.
    # And what it fetches ahead of its use comes one after the other: fetches are started in the order in which they are used, so that none
    # waits behind one that is used later.
    compiler_options={
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_all_to_all": "true",
        "xla_tpu_enforce_prefetch_fifo_order": "true",
    },
    described=True,
    proof_environment={},
    host_code=False,
    keeps_cached=True,
    memory_share=0.9,
    code_bytes=16 << 20,
    # experiments/tpu_steps/code.json: 1.1 to 1.9 MB for decode, 3.5 to 4.7 MB for 512 prompt tokens, 6.7 MB for 2048 and 8192.
    layer_code_bytes=(2_000_000, 5_000_000, 1_000_000),
)
PLATFORMS: dict[str, Platform] = {platform.name: platform for platform in (CPU, GPU, TPU)}


def platform_named(name: str) -> Platform:
    """The row of a platform, as `Chip.family` and `jax.Device.platform` name it.

    Raises:
        InvalidInput: a platform that the table does not know.
    """
    if name not in PLATFORMS:
        raise InvalidInput(f"platform '{name}': not in the table{nearest(name, PLATFORMS)}; known: {', '.join(PLATFORMS)}")
    return PLATFORMS[name]


def memory_of_virtual_devices(count: int) -> tuple[int, int]:
    """Bytes of one of so many virtual devices that share this machine's memory, and what a program may use of them."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    return total, int(0.9 * total)


def has_accelerator() -> bool:
    """Whether the machine shows a device file of an accelerator."""
    return any(True for platform in PLATFORMS.values() for pattern in platform.device_files for _ in Path("/").glob(pattern))
