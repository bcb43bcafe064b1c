"""How much memory a training needs, and how large its forward passes may be."""
