"""`python -m muralist`: the same as the command `muralist`."""

from muralist.cli.main import run

if __name__ == "__main__":
    run()
