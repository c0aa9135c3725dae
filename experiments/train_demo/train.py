"""Train the demo model, export it as a Hugging Face directory, and measure what was exported.

    python experiments/train_demo/train.py --out models/demo

writes the model directory with its evaluation.json, and results.json next to this script: the loss and the exact match while training,
from which plot.py draws. Seeds are fixed: the same versions on the same kind of processor give the same model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import sentencepiece
from evaluation import greedy_exact_match, teacher_forced
from export import WEIGHTS_FILE, load_weights, save_weights, write_configs
from flax import nnx
from model import DemoConfig, DemoModel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tasks import held_out_tasks, training_chunks
from tokenizer import train_tokenizer
from training import Progress as TrainingProgress
from training import Recipe, train

HERE = Path(__file__).parent
RECIPE = Recipe(
    steps=4000,
    chunk=50,
    batch=16,
    row_len=128,
    peak_rate=3e-3,
    warmup=200,
    kind_weights={"copy": 1.0, "sort": 1.0, "reverse": 1.0, "recall": 2.0, "repeat": 1.0},
    previous_weight=1.0,
    seed=0,
)
EVALUATION_SEED = 1
TASKS_PER_KIND = 1000
TASKS_WHILE_TRAINING = 200
EVALUATE_EVERY = 250  # steps
ALONE_LEN = 32  # BOS, any one task and EOS fit
SOLVED_BEFORE = 3  # with a fourth, the longest tasks would still end within the context


def percent(by_kind: dict[str, float]) -> str:
    """Shares as one line."""
    return "  ".join(f"{kind} {100 * share:5.1f}" for kind, share in by_kind.items())


def train_with_reports(
    config: DemoConfig, tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe
) -> tuple[DemoModel, list[dict[str, Any]]]:
    """Train under a progress bar; returns the model and the history of loss and exact match."""
    history: list[dict[str, Any]] = []
    probe = held_out_tasks(TASKS_WHILE_TRAINING, seed=EVALUATION_SEED + 1)
    data = training_chunks(
        tokenizer, seed=recipe.seed, chunk=recipe.chunk, batch=recipe.batch, row_len=recipe.row_len, kind_weights=recipe.kind_weights
    )
    with Progress(
        TextColumn("step {task.completed:5.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    ) as bar:
        line = bar.add_task("train", total=recipe.steps, loss="-")

        def report(progress: TrainingProgress, model: DemoModel) -> None:
            bar.update(line, completed=progress.step, loss=f"{progress.loss:.4f}")
            entry: dict[str, Any] = {"step": progress.step, "loss": round(progress.loss, 5), "seconds": round(progress.seconds, 1)}
            if progress.step % EVALUATE_EVERY == 0 or progress.step == recipe.steps:
                entry["exact_match"] = teacher_forced(model, tokenizer, probe, ALONE_LEN)
                shares = percent(entry["exact_match"])
                bar.console.print(f"step {progress.step:5d}  loss {progress.loss:.4f}  exact match % {shares}", soft_wrap=True)
            history.append(entry)

        model = train(DemoModel(config, nnx.Rngs(recipe.seed)), recipe, data, report)
    return model, history


def evaluate_exported(config: DemoConfig, folder: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Greedy exact match of the weights in `folder`, computed in float32 and in bfloat16, and behind solved tasks."""
    model = load_weights(config, folder / WEIGHTS_FILE)
    graph, params = nnx.split(model)
    narrow = nnx.merge(graph, jax.tree.map(lambda value: value.astype(jnp.bfloat16), params))
    held_out = held_out_tasks(TASKS_PER_KIND, seed=EVALUATION_SEED)
    in_context = held_out_tasks(TASKS_PER_KIND // 4, seed=EVALUATION_SEED, solved_before=SOLVED_BEFORE)
    return {
        "measure": "exact match of greedy decoding, EOS included, on prompts that were never trained on",
        "tasks_per_kind": TASKS_PER_KIND,
        "distinct_prompts": {kind: len({task.prompt for task in tasks}) for kind, tasks in held_out.items()},
        "seed": EVALUATION_SEED,
        "exact_match": {
            "float32": greedy_exact_match(model, tokenizer, held_out, ALONE_LEN),
            "bfloat16": greedy_exact_match(narrow, tokenizer, held_out, ALONE_LEN),
            f"float32, after {SOLVED_BEFORE} solved tasks": greedy_exact_match(model, tokenizer, in_context, config.max_len),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and export it as a Hugging Face directory.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="where the training curve goes")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="a multiple of the chunk, more than the warm-up")
    parser.add_argument("--previous-weight", type=float, default=RECIPE.previous_weight, help="0 trains on answers alone")
    args = parser.parse_args()
    if args.steps % RECIPE.chunk or args.steps <= RECIPE.warmup:
        parser.error(f"--steps must be a multiple of {RECIPE.chunk} above {RECIPE.warmup}, not {args.steps}")
    recipe = dataclasses.replace(RECIPE, steps=args.steps, previous_weight=args.previous_weight)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(args.out / "tokenizer.model")
    config = DemoConfig(vocab_size=tokenizer.vocab_size())
    model, history = train_with_reports(config, tokenizer, recipe)
    save_weights(model, args.out / WEIGHTS_FILE)
    write_configs(config, args.out)

    evaluation = evaluate_exported(config, args.out, tokenizer)
    (args.out / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    num_params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    results = {
        "model": dataclasses.asdict(config) | {"num_params": num_params},
        "recipe": dataclasses.asdict(recipe),
        "training_seconds": history[-1]["seconds"],
        "history": history,
    }
    args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{num_params} parameters, trained in {history[-1]['seconds']:.0f} s")
    for dtype, by_kind in evaluation["exact_match"].items():
        print(f"exact match % of the exported weights, {dtype}: {percent(by_kind)}")


if __name__ == "__main__":
    main()
