"""Published weights: the files that hold them, and the tables that name what is in them."""
