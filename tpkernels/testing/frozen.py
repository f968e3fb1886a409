"""The last import of the fork server. What was imported lives as long as the process: collections pass it over."""

import gc

gc.collect()
gc.freeze()
