"""What the documentation names exists."""

import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "sb3_features.md").read_text()
ROWS = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TABLE)


def test_every_feature_names_a_test():
    rows = [line for line in TABLE.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(ROWS) > 30


@pytest.mark.parametrize(("file", "test"), ROWS)
def test_named_test_exists(file, test):
    assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE)
