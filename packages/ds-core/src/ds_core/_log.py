"""The one logger of this wheel. No handler is installed: the application decides what is shown."""

import logging

logger = logging.getLogger(__package__)
