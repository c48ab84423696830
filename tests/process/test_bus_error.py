"""A memory-mapped file that is cut short ends the process with a message."""

import subprocess
import sys

CODE = """
import mmap, os, sys
from llmkd.process.bus_error import report_bus_errors
report_bus_errors()
with open(sys.argv[1], "r+b") as file:
    held = mmap.mmap(file.fileno(), 0)
    os.ftruncate(file.fileno(), 10)
print(held[50000])
"""


def test_a_mapped_file_that_is_cut_short_is_named_and_the_exit_code_is_1(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 100_000)
    done = subprocess.run([sys.executable, "-c", CODE, path], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"llmkd: {path} was rewritten or cut short while it was being read") and done.stderr.count("\n") == 1
