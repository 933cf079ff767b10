"""The clocks that durations are measured with."""

import time

# A moment in nanoseconds, by both clocks: since the epoch, and by the monotonic clock.
Moment = tuple[int, int]


class Clock:
    """The monotonic clock.

    Tests of applications freeze the time while messages are in flight. freezegun then
    replaces the functions of `time` in every module, but in no class. So a duration
    never begins by one clock and ends by another.
    """

    monotonic_ns = time.monotonic_ns


def moment_at(monotonic: int) -> Moment:
    """The moment of a recent time by the monotonic clock, in nanoseconds."""
    return time.time_ns() - (Clock.monotonic_ns() - monotonic), monotonic
