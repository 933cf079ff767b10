"""The clock that durations are measured with."""

import time


class Clock:
    """The monotonic clock.

    Tests of applications freeze the time while messages are in flight. freezegun then
    replaces the functions of `time` in every module, but in no class. So a duration
    never begins by one clock and ends by another.
    """

    monotonic_ns = staticmethod(time.monotonic_ns)
