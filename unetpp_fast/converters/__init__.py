"""Conversion from and to other implementations of UNet++, one file per implementation."""
