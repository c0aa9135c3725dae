"""Which architecture a model has, by its name, its configuration and its weights. Importing this loads no array library."""

from __future__ import annotations

from pathlib import Path

from partinf.foundation import resources
from partinf.foundation.extras import RUN, missing
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config


def read_model(model: str | Path) -> ModelConfig:
    """The architecture of a shipped name, a directory or a .toml file, with an output matrix of its own where its weights have one that its
    configuration denies. An installation that can only plan reads no weights.

    Raises:
        InvalidInput: what `load_model_config` refuses.
    """
    config = load_model_config(model)
    directory = weights_directory(model) if config.tied_embeddings else None
    if directory is None or missing(RUN, "reading weights"):
        return config
    from partinf.checkpoint.hf_names import as_stored

    return as_stored(directory, config)


def weights_directory(model: str | Path) -> Path | None:
    """The directory that holds the weights of a model given by path or shipped name; None for an architecture alone."""
    path = Path(model)
    if not path.exists():
        path = resources.find("models", str(model))
    return path if path.is_dir() else None
