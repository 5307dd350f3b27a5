"""The command where no script is on the path: `python -m mice` is `mice`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="mice")
