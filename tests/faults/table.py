"""The fault matrix: what can go wrong around a run, what llmkd then does, and the tests that show it.

python -m tests.faults              print the table
python -m tests.faults --run disk   run the tests of the rows in which a word occurs
"""

from .groups.files import FILES
from .groups.inputs import DATA, SETTINGS
from .groups.learning import MODELS, NUMBERS
from .groups.process import MACHINE, STOPS
from .groups.servers import WRITERS

TABLE = {
    "Stops": STOPS,
    "The machine": MACHINE,
    "Files": FILES,
    "Numbers": NUMBERS,
    "Models": MODELS,
    "Data": DATA,
    "Settings": SETTINGS,
    "Writers and servers": WRITERS,
}
