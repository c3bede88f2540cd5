"""The settings of each generator of the package: `config.generator`, a module each."""

from jaxrobust.config.generator_fields import ddpm, edm, gaussian, mixup, stylegan2

MODULES = (gaussian, ddpm, edm, mixup, stylegan2)
