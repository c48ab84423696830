"""Print the fault matrix, or run the tests of some of its rows."""

import argparse
import subprocess
import sys

from .table import TABLE

parser = argparse.ArgumentParser(prog="python -m tests.faults", description="The fault matrix: print it, or run the tests of its rows.")
parser.add_argument(
    "--run", nargs="*", metavar="WORD", help="run the tests of the rows in which one of the words occurs; without a word, of all"
)
chosen = parser.parse_args()
rows = [row for group in TABLE.values() for row in group]
if chosen.run is None:
    for title, group in TABLE.items():
        print(f"\n{title}")
        for row in group:
            print(f"  {row.fault}\n      {row.answer}")
    sys.exit()
nodes = [node for row in rows if not chosen.run or any(word in f"{row.fault} {row.answer}" for word in chosen.run) for node in row.nodes]
sys.exit(subprocess.call([sys.executable, "-m", "pytest", "-q", *dict.fromkeys(nodes)]))
