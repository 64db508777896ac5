"""Checks which files a wheel contains, and that the links of its description are absolute."""

import re
import sys
import zipfile
from email import message_from_bytes

with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = wheel.namelist()
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    description = message_from_bytes(wheel.read(metadata)).get_payload()

print(*names, sep="\n")
missing = {"sxe/py.typed", "sxe/_tools/check/page/page.html"} - set(names)
if missing:
    sys.exit(f"The wheel has no {', '.join(sorted(missing))}.")
others = [name for name in names if not name.startswith(("sxe/", "sxe-"))]
if others or any(name.startswith("sxe/docs/") for name in names):
    sys.exit("The wheel contains files that are not part of the package.")

if not isinstance(description, str) or not description.startswith("# sxe\n"):
    sys.exit("The description of the wheel is not README.md.")
targets = re.findall(r"\]\(([^)]*)\)", description)
relative = [target for target in targets if not target.startswith("https://")]
if relative or not any(target.endswith(".png") for target in targets):
    sys.exit(f"On a package index these links of README.md would be broken: {relative}")
if "<!--" in description:
    sys.exit("A package index shows the comments of README.md, which its description contains.")
