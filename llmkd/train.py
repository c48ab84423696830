"""accelerate launch llmkd/train.py --config recipes/X.yaml [--section.name value ...] [--resume] [--debug]"""

import os
import sys

if not __package__:  # run as a script: Python has put this folder, whose names are ours alone, first on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from llmkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
