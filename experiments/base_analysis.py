"""Where experiments of earlier versions import `jaxrobust.config.analysis` from."""

from jaxrobust.config.analysis import get_config, with_samples  # noqa: F401
