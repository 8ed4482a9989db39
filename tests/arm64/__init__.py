"""Real aarch64 userlands, of Debian bookworm and trixie, that run under qemu: `make arm64`.

- ``enter``: a program that becomes another one inside such a userland
- ``userlands``: makes them, and puts the device's package into them
- ``guest``: what runs there beside the package itself
- ``test_*``: what is held there; docs/aarch64.md says what that proves and what it cannot

Emulation says whether something is right on aarch64, never how fast or how large it is.
"""
