"""Datasets, sample sets, the input pipeline and augmentation."""
