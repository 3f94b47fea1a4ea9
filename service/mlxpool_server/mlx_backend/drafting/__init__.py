"""Guessing tokens ahead, so that one pass gives several; what is wrong is dropped."""
