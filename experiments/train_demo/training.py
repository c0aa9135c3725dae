"""The optimisation of the demo model: loss, schedule and the compiled loop over many steps.

A model this small spends more time in dispatch than in arithmetic if every step is a call, so `jax.lax.scan` runs a chunk of steps
inside one compiled call, and the next chunk of data is drawn on the host meanwhile (calls return before they are done).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from model import DemoModel, rms_norm
from tasks import Rows


def matrices_only(params: Any) -> Any:
    """Mask of what weight decay applies to: not the norms."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one run.

    Attributes:
        steps: Optimiser steps, a multiple of `chunk`.
        chunk: Steps per compiled call.
        batch: Rows per step.
        row_len: Tokens per row.
        peak_rate: Highest learning rate, reached after `warmup` steps and decayed to zero by a cosine.
        kind_weights: How often each kind of task is drawn, relative to the others.
        previous_weight: Of the loss of preceding tokens (see `Trainee`) relative to the loss of the answers.
        seed: Of the initial weights and the training data.
    """

    steps: int
    chunk: int
    batch: int
    row_len: int
    peak_rate: float
    warmup: int
    kind_weights: dict[str, float]
    previous_weight: float
    seed: int

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipped gradients; norm weights are not decayed."""
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.peak_rate, self.warmup, self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.02, mask=matrices_only))


class Trainee(nnx.Module):
    """The model with what only its training needs.

    Looking something up takes two heads in a row: one that tells every token what stands before it, and one that finds the token which
    stands behind the key that is queried. Neither is of any use without the other, so gradient descent on answers alone does not find
    them (README, "What did not work"). `previous` [V, E] reads the preceding token from the first block's output; with its loss the
    first head is learned in some hundred steps, and the second follows.
    """

    def __init__(self, model: DemoModel, rngs: nnx.Rngs) -> None:
        self.model = model
        self.previous = nnx.Param(jax.random.normal(rngs.params(), model.unembed.shape) * model.config.d_model**-0.5)

    def losses(self, rows: Rows) -> tuple[jax.Array, jax.Array]:
        """Mean cross-entropies over rows [B, T]: of the answers with their EOS (every task counts the same), and of preceding tokens."""
        states = self.model.hidden_states(rows.tokens)
        answers = optax.softmax_cross_entropy_with_integer_labels(self.model.logits(states[-1]), rows.targets)
        first = rms_norm(states[1][:, 1:], jnp.ones(()), self.model.config.rms_norm_eps)
        preceding = optax.softmax_cross_entropy_with_integer_labels(first @ self.previous[...].T, rows.tokens[:, :-1])
        return jnp.sum(answers * rows.weights) / jnp.sum(rows.weights), jnp.mean(preceding)


@dataclass(frozen=True)
class Progress:
    """Where training stands after a chunk: the mean loss of its answers, and seconds since the start with compilation."""

    step: int
    loss: float
    seconds: float


def train(model: DemoModel, recipe: Recipe, data: Iterator[Rows], report: Callable[[Progress, DemoModel], None]) -> DemoModel:
    """Train `model` on `data` and return the trained one; `report` is called after every chunk."""
    graph, params = nnx.split(Trainee(model, nnx.Rngs(recipe.seed + 1)), nnx.Param)
    optimizer = recipe.optimizer()

    def total_loss(params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
        of_answers, of_previous = nnx.merge(graph, params).losses(rows)
        return of_answers + recipe.previous_weight * of_previous, of_answers

    def step(carry: tuple[Any, Any], rows: Rows) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        (_, loss), gradients = jax.value_and_grad(total_loss, has_aux=True)(params, rows)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    run_chunk = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows), donate_argnums=0)
    start = time.perf_counter()
    carry = (jax.tree.map(jnp.copy, params), optimizer.init(params))
    rows = next(data)
    for done in range(recipe.chunk, recipe.steps + 1, recipe.chunk):
        carry, losses = run_chunk(carry, rows)
        rows = next(data)
        report(Progress(done, float(losses.mean()), time.perf_counter() - start), nnx.merge(graph, carry[0]).model)
    return nnx.merge(graph, carry[0]).model
