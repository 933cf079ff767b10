"""Tells the demo that a service has its partitions and is ready."""

from typing import Any

from kafka import ConsumerRebalanceListener


class Ready(ConsumerRebalanceListener):  # type: ignore[misc]  # untyped
    def on_partitions_revoked(self, revoked: Any) -> None:
        pass

    def on_partitions_assigned(self, assigned: Any) -> None:
        if assigned:
            print("ready", flush=True)
