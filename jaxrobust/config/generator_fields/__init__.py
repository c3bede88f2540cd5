"""The settings of each generator of the package: `config.generator`, a module each."""

from jaxrobust.config.generator_fields import biggan, ddpm, gaussian, mixup, stylegan2

MODULES = (gaussian, ddpm, mixup, stylegan2, biggan)
