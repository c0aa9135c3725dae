"""One description of an experiment, run on the devices here, on several processes, on a pod, or simulated; one form of result."""
