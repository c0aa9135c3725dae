"""Requests, pages, scheduler, policies, metrics: iteration-level batching of many requests over one runner.

The engine knows requests and steps, and nothing of models, slices or devices. What executes its steps lies above it: the model on devices
(`partinf.execution`), or the cost model on a virtual clock (`partinf.simulation`).

Names are loaded when they are first used (PEP 562), so that the sizes of steps and the table of policies can be had without the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partinf.engine.batch import Policy as Policy
    from partinf.engine.engine import Engine as Engine
    from partinf.engine.fake_runner import FakeRunner as FakeRunner
    from partinf.engine.metrics import Distribution as Distribution
    from partinf.engine.metrics import Metrics as Metrics
    from partinf.engine.metrics import Summary as Summary
    from partinf.engine.policies import FirstComeFirstServed as FirstComeFirstServed
    from partinf.engine.policies import Orca as Orca
    from partinf.engine.policies import RequestLevel as RequestLevel
    from partinf.engine.policies import request_level_iterations as request_level_iterations
    from partinf.engine.request import FinishReason as FinishReason
    from partinf.engine.request import RequestOutput as RequestOutput
    from partinf.engine.request import RequestTimes as RequestTimes
    from partinf.engine.request import SamplingParams as SamplingParams
    from partinf.engine.request import TokenEvent as TokenEvent
    from partinf.engine.runner import PageGroup as PageGroup
    from partinf.engine.runner import Runner as Runner
    from partinf.engine.runner import RunnerLimits as RunnerLimits
    from partinf.engine.streams import RequestFailed as RequestFailed
    from partinf.engine.streams import RequestStream as RequestStream

_WHERE = {
    "batch": ("Policy",),
    "engine": ("Engine",),
    "fake_runner": ("FakeRunner",),
    "metrics": ("Distribution", "Metrics", "Summary"),
    "policies": ("FirstComeFirstServed", "Orca", "RequestLevel", "request_level_iterations"),
    "request": ("FinishReason", "RequestOutput", "RequestTimes", "SamplingParams", "TokenEvent"),
    "runner": ("PageGroup", "Runner", "RunnerLimits"),
    "streams": ("RequestFailed", "RequestStream"),
}


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"partinf.engine.{module}"), name)
    raise AttributeError(f"module 'partinf.engine' has no attribute '{name}'")
