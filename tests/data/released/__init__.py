"""What released versions saved, which every later one must open."""
