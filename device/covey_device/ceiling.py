"""How much memory the service may ever take: what its unit cannot know, and the kernel may not keep.

systemd's MemoryMax= needs the kernel's memory controller, which Raspberry Pi OS turns off at boot. A bound
on data (RLIMIT_DATA, systemd's LimitDATA=) holds everywhere: an allocation beyond it fails, as a MemoryError
that costs a round. The service sets its own, at its start and when the owner's policy changes, since it
depends on two things that a file written at an installation would get wrong sooner or later: on policy.toml,
and on the machine, which changes when a card is put into another Pi.
"""

from pathlib import Path

from covey_device.config import PolicyConfig
from covey_device.confine import allowance, bound_data

MACHINE_SHARE = 0.75
"""Of the machine's memory, and no more, however much the policy allows."""

LEAST_BYTES = 192 << 20
"""With less there would be no training at all: an idle service has some 130 MB of data mapped, about half
of them resident."""

CONTROLLER_FIX = (
    "append `cgroup_enable=memory cgroup_memory=1` to the one line of /boot/firmware/cmdline.txt and "
    "restart the machine"
)


def data_ceiling(max_memory_mb: int, machine_bytes: int | None) -> int:
    """The most bytes of data that the service may ever have. max_memory_mb: limits.max_memory_mb of the
    policy, which is about resident memory; for that much resident, `allowance` may be mapped.
    machine_bytes: its memory; None: not known."""
    wanted = allowance(max_memory_mb * 1_000_000)
    if machine_bytes is not None:
        wanted = min(wanted, int(machine_bytes * MACHINE_SHARE))
    return max(wanted, LEAST_BYTES)


def machine_bytes(root: Path = Path("/")) -> int | None:
    """Memory of this machine, as its kernel counts it; None where it does not say."""
    try:
        for line in (root / "proc/meminfo").read_text("ascii", "replace").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def memory_controller(root: Path = Path("/")) -> bool | None:
    """Whether MemoryHigh= and MemoryMax= do anything; None where that cannot be told (no cgroups v2)."""
    try:
        text = (root / "sys/fs/cgroup/cgroup.controllers").read_text("ascii", "replace")
    except OSError:
        return None
    return "memory" in text.split()


def in_words(ceiling: int, controller: bool | None) -> str:
    """What holds the service's memory, and how more would, in one line for its owner."""
    held = f"memory: at most {ceiling / 1e6:,.0f} MB of data (LimitDATA)"
    if controller is None:
        return held
    if controller:
        return f"{held}, and MemoryMax of the unit"
    return f"{held}; MemoryMax does nothing, as this kernel's memory controller is off: {CONTROLLER_FIX}"


def bound_to_policy(policy: PolicyConfig) -> str:
    """Bound this process; what holds, in words."""
    bound = bound_data(data_ceiling(policy.limits.max_memory_mb, machine_bytes()))
    return in_words(bound, memory_controller())
