"""Generators, fitted to the training images only; `generator` says how to add one."""
