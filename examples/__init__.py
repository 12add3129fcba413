"""Sample data of unetpp_fast, installed as `unetpp_fast.examples`."""
