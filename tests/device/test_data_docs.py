"""docs/data.md is run: its Python is executed, its tables are opened, its errors are compared.

The blocks run in order in one folder. A `text` block is the error of the table before it, be it
when the data is opened or, after a `python` block in between, when a batch is read.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from covey_device.data import DataConfig, batches, open_source
from covey_device.data.growing import Growth
from covey_shared.errors import DataError
from device_support import IMAGES, make_header

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WEATHER = make_header(name="weather")


def test_the_page_is_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names, source, error = {}, None, None
    told, kinds, growth = 0, set(), Growth(tmp_path / "state")
    for language, block in BLOCK.findall(PAGE):
        if language != "text" and error is not None:
            pytest.fail(f"the page does not show this error: {error}")
        if language == "python":
            exec(block, names)  # noqa: S102 - the page's own examples
        elif language == "toml":
            config = msgspec.convert(tomllib.loads(block)["data"], type=DataConfig)
            kinds.add(type(config).__name__)
            header = WEATHER if "csv" in block or "weather" in block else IMAGES
            try:
                source = open_source(config, header, base=tmp_path, growth=growth)
                next(batches(source, 8, np.random.default_rng(0)))
            except DataError as raised:
                error = str(raised)
        elif language == "sh":
            subprocess.run(["sh", "-e", "-c", block], check=True, timeout=30)
        else:
            assert language == "text"
            if error is None:
                with pytest.raises(DataError) as caught:
                    source.batch(np.arange(8))
                error = str(caught.value)
            assert block.strip() == error
            error, told = None, told + 1
    assert error is None
    assert len(kinds) == 6
    assert told >= 12
    sys.modules.pop("garden", None)
