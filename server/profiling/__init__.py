"""Searches for heads, layers and strength of a method on labelled data; the result is a profile."""
