"""Type checkers see what users see."""

import pathlib

from mypy import api

import sb3_boom


def test_code_of_users_type_checks():
    assert pathlib.Path(sb3_boom.__file__).with_name("py.typed").exists()
    output, errors, status = api.run(["--strict", str(pathlib.Path(__file__).with_name("user_code.py"))])
    assert status == 0, output + errors
