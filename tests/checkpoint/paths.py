"""Where the fixture directories are; apart from `trees`, so that tests of tokenizers do not import jax."""

from __future__ import annotations

from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
LLAMAS = ("llama_gqa", "llama_tied_mqa", "llama_rope_scaled")
FAMILIES = ("gpt2_small", "opt_small", "qwen3_small", "neox_small")
