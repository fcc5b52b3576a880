"""Start several processes as one run, synchronise them, and notice when one fails."""
