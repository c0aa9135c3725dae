"""Scheduling policies, one small file each behind `partinf.engine.batch.Policy`."""

from partinf.engine.policies.fcfs import FirstComeFirstServed
from partinf.engine.policies.orca import Orca
from partinf.engine.policies.request_level import RequestLevel, request_level_iterations

__all__ = ["FirstComeFirstServed", "Orca", "RequestLevel", "request_level_iterations"]
