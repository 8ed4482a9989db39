"""Coverage-guided fuzzing of whatever reads bytes that others wrote; see docs/fuzzing.md.

`targets` are functions of bytes and what may come of them; `harness` runs one input and judges it, with or
without atheris; `child` is one fuzzing process; `__main__` runs all targets one after the other.
"""
