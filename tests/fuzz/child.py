"""One fuzzing process: `python -m fuzz.child TARGET PROGRAM [libFuzzer's options and folders]`.

PROGRAM is what starts another like it: libFuzzer does so when it merges.

The only module that needs atheris. Everything of covey, and what reads its TOML, is instrumented as it is
imported; so nothing of it may be imported before.
"""

import random
import re
import sys
import zlib

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

COUNTERS = 8192
_DETAIL = re.compile(
    r"(?<=unknown field).*|'.*(?:'|$)|\".*(?:\"|$)|`(?!\$)[^`]*`"
    r"|0x[0-9a-f]+|[0-9a-f]{8,}|(?<!\[)\d+|(?<!\$)\[[^\]]*\]|[^ -~]",
    re.DOTALL,
)
"""What tells one error's words from another's of the same kind."""

INSTRUMENTED = ["covey_shared", "covey_device", "covey_coordinator", "tomllib"]


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    name, program, options = sys.argv[1], sys.argv[2], sys.argv[3:]
    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz.harness import check, traced
        from fuzz.targets import target

        it = target(name)
    # What came of an input counts like an edge of code: the decoders themselves are C, and not instrumented.
    first = atheris._reserve_counter()
    for _ in range(COUNTERS - 1):
        atheris._reserve_counter()
    with it.ready() as run, traced():

        def one(data: bytes) -> None:
            for words in check(it, run, data):
                kind = _DETAIL.sub("", words[:400]).encode()
                atheris._trace_branch(first + zlib.crc32(kind) % COUNTERS)

        def mutated(data: bytes, longest: int, seed: int) -> bytes:
            chance = random.Random(seed)
            if it.mutate is None or chance.random() < 0.1:
                return bytes(atheris.Mutate(data, longest))
            made = it.mutate(
                data, longest, chance, lambda part, most: bytes(atheris.Mutate(part, most))
            )
            return made[:longest]

        atheris.Setup([program, *options], one, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
