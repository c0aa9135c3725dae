"""One engine over several processes, one per host: the first takes requests, all make the same schedule, none of them can hang.

group = partinf.hosts.join()              # in every process, before jax looks for devices
model = partinf.load("demo", plan, group=group)
if group.leads:
    print(model.generate(["sort: d b a c ="])[0].text)
    group.close()
else:
    group.follow(model.engine)
"""

from partinf.hosts.group import Group, JobEnded
from partinf.hosts.job import Job, join
from partinf.hosts.watch import Bounds

__all__ = ["Bounds", "Group", "Job", "JobEnded", "join"]
