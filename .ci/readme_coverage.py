"""Write the computed coverage table into README.md; `tests/test_readme.py` checks that it is there."""

import re
from pathlib import Path

from attnspec.conformance.coverage import table

readme = Path(__file__).resolve().parent.parent / "README.md"
text = readme.read_text(encoding="utf-8")
part = f"<!-- coverage -->\n{table()}\n<!-- end -->"
readme.write_text(
    re.sub(r"<!-- coverage -->\n.*?<!-- end -->", lambda _: part, text, flags=re.DOTALL), encoding="utf-8"
)
