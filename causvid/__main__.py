"""``python -m causvid``, and ``torchrun -m causvid``."""

from causvid.cli import main

if __name__ == "__main__":
    main()
