"""The protocol that coordinator and device share.

No sockets, no clock, no files, no global randomness and no torch live here; `mqtt` and `runtime`
are the two named exceptions at its edge. Read `messages`, then `secagg`.
"""

__version__ = "0.1.0"
