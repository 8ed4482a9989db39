"""Times as people read them."""

import time


def moment(unix: float) -> str:
    """A time for people, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix))
