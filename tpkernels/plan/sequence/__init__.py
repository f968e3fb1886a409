"""Sequence parallel: tokens sharded between the blocks of a decoder, gathered in front of what needs all of them."""
