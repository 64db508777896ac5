"""Prints the oldest version of each dependency in a pyproject.toml, for pip."""

import re
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    for requirement in tomllib.load(file)["project"]["dependencies"]:
        print(re.sub(r">=([\d.]+).*", r"==\1", requirement))
