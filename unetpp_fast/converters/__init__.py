"""The weights of other implementations of UNet++, one file per implementation."""
