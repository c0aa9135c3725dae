"""Chooses how a model is split over a slice: every role assignment priced, ordered, and turned into a `Plan`."""

from partinf.planner.choose import plan, plan_of
from partinf.planner.report import Candidate, PhaseResult, PlanReport
from partinf.planner.search import search

__all__ = ["Candidate", "PhaseResult", "PlanReport", "plan", "plan_of", "search"]
