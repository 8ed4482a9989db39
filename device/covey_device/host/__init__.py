"""The device's care for the machine it is a guest on.

``readings``: what the machine says of itself. ``config``: the owner's conditions, ``[host]`` in policy.toml.
``eligibility``: from both to go, pause or stop, each with its reasons. ``waits``: what local programs ask
for. ``decisions``: what was decided and why, kept for the owner. ``care`` puts them together for the
service; ``port`` is the local socket; ``words`` is what people are shown.
"""
