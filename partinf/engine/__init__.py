"""Requests, pages, schedulers, runners, metrics: iteration-level batching of many requests over one runner.

This package imports no JAX. The runner that executes the model, `partinf.execution.runner`, is imported by name by those who want it.
"""

from partinf.engine.batch import Policy
from partinf.engine.engine import Engine
from partinf.engine.fake_runner import FakeRunner
from partinf.engine.metrics import Distribution, Metrics, Summary
from partinf.engine.policies import FirstComeFirstServed, Orca, RequestLevel, request_level_iterations
from partinf.engine.request import FinishReason, RequestOutput, RequestTimes, SamplingParams, TokenEvent
from partinf.engine.runner import Runner, RunnerLimits
from partinf.engine.streams import RequestFailed, RequestStream

__all__ = [
    "Distribution",
    "Engine",
    "FakeRunner",
    "FinishReason",
    "FirstComeFirstServed",
    "Metrics",
    "Orca",
    "Policy",
    "RequestFailed",
    "RequestLevel",
    "RequestOutput",
    "RequestStream",
    "RequestTimes",
    "Runner",
    "RunnerLimits",
    "SamplingParams",
    "Summary",
    "TokenEvent",
    "request_level_iterations",
]
