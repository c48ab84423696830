"""accelerate launch llmkd/train.py --config recipes/X.yaml [--section.name value ...] [--resume] [--debug]"""

import os
import sys

if not __package__:  # run as a script: Python has put this folder, whose names are ours alone, first on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from llmkd.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
elif __name__ == "llmkd.train":
    from llmkd import api

    # Oddity: this file's name is also that of the Python API's function, to which it leaves the name when it is imported.
    sys.modules[__name__] = api.train
