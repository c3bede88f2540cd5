"""Where experiments of earlier versions import `jaxrobust.config.tables` from."""

from jaxrobust.config.tables import Preparation, Row, Table  # noqa: F401
