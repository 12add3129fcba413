"""`python -m unetpp_fast.info`: what is installed and what can run on this machine."""

from .cli.info import lines

__all__ = ["lines"]

if __name__ == "__main__":
    print("\n".join(lines()))
