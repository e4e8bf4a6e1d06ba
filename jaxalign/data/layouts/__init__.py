"""Rows of other people's files as feedback records, a pure function a layout.

Each file of a layout has ``convert(rows)``, which yields records and what was dropped
and why; :mod:`jaxalign.data.layouts.table` knows which layout a row is of.
"""

from jaxalign.data.layouts.foreign import Converted, Dropped
from jaxalign.data.layouts.table import LAYOUTS, check_name, read, recognise


__all__ = ["LAYOUTS", "Converted", "Dropped", "check_name", "read", "recognise"]
