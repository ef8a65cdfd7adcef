"""Built-in scenes. One takes seconds to draw, so the tests of a process share it."""

from functools import cache

from cbnerf.data.library import make_capture

draw = cache(make_capture)
