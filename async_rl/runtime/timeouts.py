"""How long one process of a run waits for another before it concludes that the other one hangs or has died."""

ANSWER_S = 5.0
"""An actor's event loop responds within milliseconds; one that has not responded for this long hangs."""

RANK_DEATH_S = 5.0
"""Trainer ranks compute together: when one dies, the others fail or wait for it indefinitely. This long after the first
failure, the death of a process is known."""

PAYLOAD_S = 120.0
"""Messages of groups arrive one after the other, within seconds on a fast network. Ray takes a host for dead that has
failed five health checks, after 15 s if it refuses them and 65 s if it is silent. Messages of a host that Ray takes for
alive are lost, too, when none of those that a process waits for has come for so long."""

SHUTDOWN_S = 8.0
"""At the end of a run the actors are asked to close; the processes of those that take longer are killed."""
