"""The secure-aggregation protocol's own steps, as small state machines without I/O.

`participant`  a device as a contributor: keys, shares, its masked update
`committee`    a device as a share holder: votes and reveals
`aggregator`   the coordinator: running sum, shares, unmasking
`rules`        what every side refuses, in one place
`cohort`       a verified manifest: who takes part, with which keys, under which head
`parameters`   degree, committee and threshold for a cohort of n

The protocol is Bonawitz et al. 2017, "Practical Secure Aggregation" (eprint 2017/281), in its
actively secure variant, with the roster co-signed before anyone uploads. docs/protocol.md tells it
message by message.
"""
