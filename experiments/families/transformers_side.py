"""The half of the matrix that needs transformers: makes a directory for every case, and says what transformers makes of it.

    python transformers_side.py make FOLDER SEED [CASE …]      directories with random weights, norms and biases included
    python transformers_side.py answer FOLDER [CASE …]         log-probabilities of the sequences in every `questions.json`

A directory's sequences are scored with as many tokens behind them as the longest context that is served, for the rotations that depend
on it; no token sees those behind it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import cases


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random weights that no two parameters share the scale of by chance: matrices of deviation 1.2/√inputs, norms and biases off their
    usual values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim <= 1:
                weight.add_(0.3 * drawn)
            else:
                end = any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
                weight.copy_((1.6 if end else 1.2) * drawn / weight.shape[-1] ** 0.5)
        for name, numbers in model.named_buffers():  # what a router adds for the choice alone
            if "correction_bias" in name or "expert_bias" in name:
                numbers.add_(0.3 * torch.randn(numbers.shape, generator=generator))


def change(directory: Path, written: cases.Config, renamed: tuple[str, str] | None) -> None:
    """Keys of a saved configuration, and the beginnings of the names of tensors."""
    file, weights = directory / "config.json", directory / "model.safetensors"
    if written:
        file.write_text(json.dumps(json.loads(file.read_text()) | written))
    if renamed is not None:
        tensors = {name.replace(*renamed, 1): tensor for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})


def make(folder: Path, seed: int, names: list[str]) -> None:
    for number, (name, (model_type, arguments)) in enumerate(cases.CASES.items()):
        directory = folder / name.replace(", ", "-").replace(" ", "_")
        if (names and name not in names) or directory.exists():
            continue
        sizes = cases.drawn(1000 * seed + number)
        try:
            settings = arguments(sizes)
            written, renamed = settings.pop(cases.WRITTEN, {}), settings.pop(cases.RENAMED, None)
            config = transformers.CONFIG_MAPPING[model_type](**settings)
            made = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else transformers.AutoModelForCausalLM
            torch.manual_seed(seed)
            model = made.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
            randomise(model, 7919 * seed + number)
            model.save_pretrained(directory)
            change(directory, written, renamed)
            (directory / "case.json").write_text(json.dumps({"case": name, "model_type": model_type, "vocab_size": sizes["vocab_size"]}))
        except Exception as error:  # the table says which cases this version of transformers does not make
            print(f"{name}: not made: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


@torch.no_grad()
def answer(directory: Path) -> None:
    questions = json.loads((directory / "questions.json").read_text())
    wrapped = "vision_config" in json.loads((directory / "config.json").read_text())
    made = transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
    model = made.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    found = {}
    for number, tokens in enumerate(questions["sequences"]):
        padded = torch.tensor([tokens + [3] * (questions["served"] - len(tokens))])
        scores = torch.log_softmax(model(input_ids=padded, use_cache=False).logits[0, : len(tokens)].float(), -1)
        found[f"logprobs_{number}"] = scores.numpy()
    np.savez(directory / "answers.npz", **found)


def main() -> None:
    torch.set_num_threads(1)
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make(folder, int(sys.argv[3]), sys.argv[4:])
        return
    for directory in sorted(path.parent for path in folder.glob("*/questions.json")):
        named = json.loads((directory / "case.json").read_text())["case"]
        if not (directory / "answers.npz").exists() and (len(sys.argv) == 3 or named in sys.argv[3:]):
            answer(directory)


if __name__ == "__main__":
    main()
