"""Regular expressions as recipes hold them: refused when the recipe is read, not when a completion comes."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression of Python: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression of Python's `re`; `(?s)` at its front lets `.` match line ends, `(?i)` ignores case."""
