"""Check, import, show and write data sets."""
