"""Real images: data sets, the mix that is trained on, augmentation."""
