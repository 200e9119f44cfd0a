"""One file per way to run the programs of an artifact; the manifest names which."""
