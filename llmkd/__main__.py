"""`python -m llmkd` is the `llmkd` command."""

from .cli import entry

if __name__ == "__main__":
    entry()
