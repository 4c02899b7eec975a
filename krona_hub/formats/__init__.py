"""One file per format, each a spoke around Adapter; FORMATS lists them."""
