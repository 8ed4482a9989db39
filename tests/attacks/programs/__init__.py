"""Attackers as programs: they speak the real protocol over a real broker. See ../README.md."""
