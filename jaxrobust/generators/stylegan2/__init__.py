"""StyleGAN2 with adaptive augmentation of what the discriminator sees."""
