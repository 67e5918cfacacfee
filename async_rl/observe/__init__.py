"""Looking at runs: what a run folder says, live in a terminal, as a report, in Prometheus.

Reads run folders; never writes into one, and never talks to a run's processes. So it works on a run that goes on, on
one that has ended, and on one that was copied from elsewhere. Knows ``runfolder``'s names and ``metrics.declared``.
"""
