"""Tasks made by a program, and the tiny policies that start on them."""
