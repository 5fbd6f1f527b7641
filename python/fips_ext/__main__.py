"""``python -m fips_ext`` is the ``fips`` command."""

from .cli import main

if __name__ == "__main__":
    main()
