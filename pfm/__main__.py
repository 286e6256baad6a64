"""``python -m pfm``: the command line where the script ``pfm`` is not on the path."""

from pfm.cli import main

if __name__ == "__main__":
    main()
