"""The simulated fleet: a broker, a coordinator and n devices on one machine, and `covey demo`.

The same code as in the field: nothing here implements the protocol, trains or sums. What is added
is what only a simulation can have: devices that vanish at chosen moments (`faults`), a witness that
knows every plaintext and so can check every sum (`witness`), an ear at the broker (`eavesdropper`),
and a report.

Read in this order: `command`, `demo`, `fleet`, `device`, `faults`.
"""
