"""Where experiments of earlier versions import `jaxrobust.config.generator` from."""

from jaxrobust.config.generator import get_config  # noqa: F401
