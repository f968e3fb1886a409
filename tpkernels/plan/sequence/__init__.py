"""Sequence parallel: tokens cut between the blocks of a decoder, gathered in front of what needs all of them."""
