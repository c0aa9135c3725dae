"""Directories of mixtures of experts: experts stacked from tensors of their own, four bits widened, little in memory at a time."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from partinf.checkpoint import hf, mxfp4
from partinf.checkpoint.hf import check_hf, load_from, load_hf, save_hf
from partinf.checkpoint.safetensors_files import TensorReader
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.quantize import Quantized, quantize
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer.params import abstract_params
from partinf.workload import DType
from tests.checkpoint.paths import FIXTURES
from tests.checkpoint.trees import abstract_tree, all_tensors, assert_same, make_mesh

SPECS = {"wx_in": ("x", None, "y", None), "wx_out": ("x", None, "y"), "bx_in": ("x", None, "y"), "bx_out": ("x", None)}
GPT_OSS = FIXTURES / "gpt_oss_small"


def widened_by_hand(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """One number after the other, [X, rows, columns]."""
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    elements = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    found = np.zeros((*scales.shape, 32), np.float32)
    for place in np.ndindex(*scales.shape):
        for at, byte in enumerate(blocks[place]):
            for half, code in enumerate((int(byte) & 15, int(byte) >> 4)):
                sign = -1.0 if code & 8 else 1.0
                found[place][2 * at + half] = sign * elements[code & 7] * 2.0 ** (int(scales[place]) - 127)
    return found.reshape(*scales.shape[:2], -1)


def test_four_bits_are_widened_to_the_numbers_that_they_are() -> None:
    """Gate and up take turns along the rows; every shard is the slice of the whole."""
    config = load_model_config(GPT_OSS)
    tensors = all_tensors(GPT_OSS)
    found = load_hf(GPT_OSS, config, abstract_tree(config, make_mesh(2, 4), specs=SPECS))["layers"][1]
    gate_up = widened_by_hand(tensors, "model.layers.1.mlp.experts.gate_up_proj")
    down = widened_by_hand(tensors, "model.layers.1.mlp.experts.down_proj")
    np.testing.assert_array_equal(found["wx_in"], np.stack([gate_up[:, 0::2], gate_up[:, 1::2]], axis=1))
    np.testing.assert_array_equal(found["wx_out"], down)
    bias = np.asarray(tensors["model.layers.1.mlp.experts.gate_up_proj_bias"], np.float32)
    np.testing.assert_array_equal(found["bx_in"], np.stack([bias[:, 0::2], bias[:, 1::2]], axis=1))
    bfloat16 = load_hf(GPT_OSS, config, abstract_tree(config, make_mesh(1, 1), dtype=jax.numpy.bfloat16))["layers"][1]
    np.testing.assert_array_equal(np.asarray(bfloat16["wx_out"], np.float32), down)  # exactly


def test_a_part_of_a_row_reads_its_blocks_alone() -> None:
    with TensorReader(GPT_OSS) as reader:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        whole = mxfp4.read(reader, name, (slice(0, 4), slice(0, 64), slice(0, 32)))
        part = mxfp4.read(reader, name, (slice(1, 3), slice(5, 9), slice(3, 17)))
    np.testing.assert_array_equal(part, whole[1:3, 5:9, 3:17])


def test_four_bits_are_saved_as_plain_numbers_and_read_again(tmp_path: Path) -> None:
    config = load_model_config(GPT_OSS)
    params = load_hf(GPT_OSS, config, abstract_tree(config, make_mesh(1, 1)))
    save_hf(params, config, tmp_path / "gpt_oss_small")
    assert load_file(tmp_path / "gpt_oss_small" / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 32, 64)
    assert_same(load_hf(tmp_path / "gpt_oss_small", config, abstract_tree(config, make_mesh(1, 1))), params)


def test_what_is_wrong_with_packed_tensors_is_named(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(GPT_OSS, tmp_path / "gpt_oss_small"))
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    tensors["model.layers.1.mlp.experts.down_proj_blocks"] = np.zeros((4, 32, 2, 16), np.uint8)
    tensors["model.layers.1.mlp.experts.down_proj_scales"] = np.zeros((4, 32, 1), np.float32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InvalidInput) as caught:
        check_hf(directory, load_model_config(directory))
    assert caught.value.offences == (
        "model.layers.0.mlp.experts.down_proj_scales: missing; expected shape (4, 32, 1)",
        "model.layers.1.mlp.experts.down_proj_blocks: found shape (4, 32, 2, 16), expected (4, 32, 1, 16)",
        "model.layers.1.mlp.experts.down_proj_scales: stored as F32; expected one of U8",
    )
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="quantised checkpoints are not read"):
        load_model_config(directory)


def test_missing_experts_are_one_line(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "mixtral_small", tmp_path / "mixtral_small"))
    tensors = load_file(directory / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if ".experts.2." not in name}, directory / "model.safetensors")
    with pytest.raises(InvalidInput) as caught:
        check_hf(directory, load_model_config(directory))
    named = "model.layers.[0-1].block_sparse_moe.experts.2"
    assert caught.value.offences == tuple(
        f"{named}.{name}.weight: missing; expected shape {shape} (2 tensors)"
        for name, shape in (("w1", (48, 32)), ("w3", (48, 32)), ("w2", (32, 48)))
    )


def plan_of(name: str, weights: DType) -> Plan:
    roles = {"x": "expert", "y": "ffn"}
    layout = make_layout({"x": "replica", "y": "ffn"}, {"x": "batch", "y": "heads"}, experts=roles)
    return Plan(load_model_config(FIXTURES / name), parse_slice("cpu:4x2"), layout, weights=weights, kv=DType.F32)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("weights", [DType.F32, DType.INT8])
def test_a_process_holds_its_share_and_one_shard_more(monkeypatch: pytest.MonkeyPatch, weights: DType, unrolled: bool) -> None:
    """Of what is read and not yet on a device, nothing is left when the next shard is read; no byte is read twice."""
    alive: list[int] = []
    held = 0

    def track(array: np.ndarray) -> np.ndarray:
        nonlocal held
        held += array.nbytes
        weakref.finalize(array, lambda size: freed(size), array.nbytes)
        return array

    def freed(size: int) -> None:
        nonlocal held
        held -= size

    read_leaf, read_quantized, device_put = hf.read_leaf, hf._read_quantized, jax.device_put

    def read(*args: Any) -> np.ndarray:
        alive.append(held)
        return track(read_leaf(*args))

    def read_and_quantize(*args: Any) -> Quantized:
        found = read_quantized(*args)
        return Quantized(track(found.values), found.scale, found.contracted)

    monkeypatch.setattr(hf, "read_leaf", read)
    monkeypatch.setattr(hf, "_read_quantized", read_and_quantize)
    monkeypatch.setattr(jax, "device_put", lambda block, device: device_put(np.array(block), device))  # never the same memory
    plan = plan_of("qwen3_moe_small", weights)
    mesh = device_mesh(plan)
    with TensorReader(FIXTURES / "qwen3_moe_small") as reader:
        load_from(reader, plan.model, abstract_params(plan, mesh, unrolled))
        assert reader.bytes_read == sum(tensor.nbytes for tensor in all_tensors(FIXTURES / "qwen3_moe_small").values())
    assert max(alive) == 0


def test_experts_are_quantised_while_they_are_loaded() -> None:
    """As the whole matrices would be, whatever they are split over; the router is not."""
    plan = plan_of("gpt_oss_small", DType.INT8)
    found = load_hf(GPT_OSS, plan.model, abstract_params(plan, device_mesh(plan), unrolled=True))["layers"]
    whole = load_hf(GPT_OSS, plan.model, abstract_tree(plan.model, make_mesh(1, 1)))["layers"]
    for layer, plain in zip(found, whole, strict=True):
        for name in ("wx_in", "wx_out"):
            expected = quantize(np.asarray(plain[name]), (-1,))
            np.testing.assert_array_equal(layer[name].values, expected.values)
            np.testing.assert_allclose(layer[name].scale, expected.scale, rtol=1e-6)
        assert not isinstance(layer["router"], Quantized)
