"""Each checkpoint test that asks for `llama` runs on every fixture directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from tests.checkpoint.paths import FIXTURES, LLAMAS


@pytest.fixture(params=LLAMAS)
def llama(request: pytest.FixtureRequest) -> Path:
    return FIXTURES / request.param


@pytest.fixture
def config(llama: Path) -> ModelConfig:
    return load_model_config(llama)
