"""What small runs do without: a third of their time, which most tests do not ask for."""

import os
from collections.abc import Callable

from llmkd.data.encoding import template_process
from llmkd.output import plots


def leave_out(replace: Callable) -> None:
    """loss.png, which the run from the wheel draws, and test_plots.py; the wait for the disk; the end of the process of chat templates.

    `replace(object, name, value)`: setattr, or a patch's.
    """
    replace(plots, "plot_losses", lambda folder: (folder / "loss.png").touch())
    replace(os, "fsync", os.fstat)  # a file that is closed is an error still
    replace(template_process, "close", lambda: None)  # test_template_process.py has the real one
