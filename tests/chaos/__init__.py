"""Faults on real processes: kills, stops, broken networks and full disks. See `__main__`."""
