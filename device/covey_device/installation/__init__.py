"""A device as a service of a systemd machine: its user, its unit, its directories, and their end.

`machine` is the one place that runs the system's programs; `service` puts everything in its place and
takes it away again; `joining` enrols a device there. The commands are in `installation.commands`. Nothing
of this is loaded by the service itself.
"""
