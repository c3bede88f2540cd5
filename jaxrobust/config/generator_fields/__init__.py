"""The settings of each generator of the package: `config.generator`, a module each."""

from jaxrobust.config.generator_fields import (
  biggan,
  ddpm,
  edm,
  gaussian,
  mixup,
  stylegan2,
  vdvae,
)

MODULES = (gaussian, ddpm, mixup, edm, vdvae, stylegan2, biggan)
