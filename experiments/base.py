"""Where experiments of earlier versions import `jaxrobust.config.classifier` from."""

from jaxrobust.config.classifier import get_config, parse_arg, with_arg  # noqa: F401
