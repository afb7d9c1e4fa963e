"""``python -m fusewise`` is the command line."""

from fusewise.cli import main

if __name__ == "__main__":
    main()
