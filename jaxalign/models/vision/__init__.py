"""Vision: a tower over patches of pictures, what connects it, and the merge."""
