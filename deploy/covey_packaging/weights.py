"""What a device's tree weighs, and how much it may.

All sizes are bytes, and MB is 10^6 of them. What counts is what lies on the card: every file of the tree,
the bytecode that Python makes of it at installation included, each rounded up to the 4 KiB blocks of
its file system, and a block for each directory.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from covey_packaging.tree import Tree

BLOCK_BYTES = 4096

MOST_BYTES = {"arm64": 150_000_000, "amd64": 180_000_000}
MOST_DISTRIBUTIONS = 16


@dataclass(frozen=True, slots=True)
class Weight:
    """What one tree weighs. disk_bytes: all in all, in blocks, with bytecode."""

    tree: Tree
    bytecode_bytes: int
    disk_bytes: int

    @property
    def wheel_bytes(self) -> int:
        """What is downloaded for it."""
        return sum(distribution.wheel_bytes for distribution in self.tree.distributions)

    @property
    def unpacked_bytes(self) -> int:
        """All that is in its wheels."""
        return sum(distribution.unpacked_bytes for distribution in self.tree.distributions)

    @property
    def kept_bytes(self) -> int:
        """What of that a device keeps."""
        return sum(distribution.kept_bytes for distribution in self.tree.distributions)

    @property
    def most_bytes(self) -> int:
        """What it may have on the disk."""
        return MOST_BYTES[self.tree.target.arch]


def weigh(tree: Tree) -> Weight:
    """Weigh a tree, which is left as it is.

    Its bytecode is that of the Python this runs on: another release's differs by a few per cent. A module
    that only a later Python can read counts as if its bytecode were as long as its source.
    """
    files = [path for path in tree.path.rglob("*") if not path.is_symlink()]
    modules = [path for path in files if path.suffix == ".py"]
    directories = {tree.path, *(path for path in files if path.is_dir())}
    directories |= {path.parent / "__pycache__" for path in modules}
    with tempfile.TemporaryDirectory(prefix="covey-bytecode-") as elsewhere:
        command = [sys.executable, "-X", f"pycache_prefix={elsewhere}", "-m", "compileall", "-qq"]
        subprocess.run([*command, "-j", "0", str(tree.path)], capture_output=True)
        tag = sys.implementation.cache_tag
        compiled = {path: Path(f"{elsewhere}{path.with_suffix('')}.{tag}.pyc") for path in modules}
        bytecode = sizes(made if made.exists() else path for path, made in compiled.items())
    disk = sum(map(in_blocks, [*bytecode, *sizes(path for path in files if path.is_file())]))
    return Weight(tree, sum(bytecode), disk + len(directories) * BLOCK_BYTES)


def sizes(paths: Iterable[Path]) -> list[int]:
    """The sizes of files."""
    return [path.stat().st_size for path in paths]


def in_blocks(size: int) -> int:
    """What a file of this size takes on a disk."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
