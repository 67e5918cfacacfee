"""Shows runs to people: live in a terminal, as an HTML report, and in Prometheus and Grafana.

Reads run folders; never writes into one, and never talks to a run's processes. So it works on a run in progress, on one
that has ended, and on one that was copied from elsewhere. Knows ``runfolder``'s names and ``metrics.declared``.
"""
