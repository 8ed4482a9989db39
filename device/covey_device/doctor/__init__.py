"""`covey-device doctor`: looks at the machine, and at what a device is made of, before it matters.

Read `findings` for what a check says, `checkup` for which there are and in what order. The parts: `machine`
and `disk` (the machine), `packages`, `known_answers` and `first_step` (what is installed computes what it
should), `enrolled` and `unit` (what `covey-device join` made), `network` (the broker), `estimate` (what a
round of a plan costs here).

Nothing here changes anything: the one file that is written, to see whether the disk takes it, is removed.
Nothing of this package is loaded by the service.
"""
