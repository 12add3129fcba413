"""`python -m unetpp_fast` is `unetpp-fast`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
