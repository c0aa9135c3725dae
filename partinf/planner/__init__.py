"""Chooses how a model is split over a slice: every role assignment priced, ordered, and turned into a `Plan`."""

from partinf.planner.choose import plan
from partinf.planner.report import PlanReport, search
from partinf.planner.results import Candidate, PhaseResult

__all__ = ["Candidate", "PhaseResult", "PlanReport", "plan", "search"]
