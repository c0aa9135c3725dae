"""What the extras of an installation bring, and the line that names the one to install where something is missing.

Planning, explaining and simulating need none of them. pyproject.toml says which versions; a test holds the two lists together.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

from partinf.foundation.errors import InvalidInput

RUN, SERVE, PLOT, PROOF = "run", "serve", "plot", "proof"

# The modules that partinf imports, as Python names them. Each extra but `plot` brings those of `run` too.
_RUN = (
    *("jax", "numpy", "safetensors", "tokenizers", "sentencepiece", "jaxlib", "ml_dtypes"),
    *("absl", "flax", "msgspec", "orbax", "scipy"),
)
MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        RUN: _RUN,
        SERVE: (*_RUN, "jinja2", "llguidance", "prometheus_client", "starlette", "uvicorn"),
        PROOF: _RUN,  # and the TPU compiler, which only TPUs need: `partinf.proof.unavailable`
        PLOT: ("matplotlib",),
    }
)
_NAMED = 3


def missing(extra: str, who: str, modules: tuple[str, ...] | None = None) -> str | None:
    """One line on what `who` needs and how to install it, or None where all of it is installed.

    Args:
        modules: the part of the extra that is needed; all of it if not given.
    """
    absent = [name for name in modules or MODULES[extra] if importlib.util.find_spec(name) is None]
    return line(extra, who, absent) if absent else None


def need(extra: str, who: str) -> None:
    """Go on only where everything that this extra brings is installed.

    Raises:
        InvalidInput: the line of `missing`.
    """
    if reason := missing(extra, who):
        raise InvalidInput(reason)


def line(extra: str, who: str, absent: list[str]) -> str:
    """The message where these modules of an extra are not installed."""
    names = absent if len(absent) <= _NAMED else [*absent[: _NAMED - 1], f"{len(absent) - _NAMED + 1} more"]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{who} needs {listed}, not installed here: pip install 'partinf[{extra}]'"


def extra_of(module: str | None) -> str | None:
    """The smallest extra that brings a module (`jax.numpy` as well as `jax`), or None where no extra does."""
    top = (module or "").partition(".")[0]
    return next((extra for extra, modules in MODULES.items() if top in modules), None)
