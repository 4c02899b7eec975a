"""The formats that krona_hub knows, each a value of `Format`."""
