"""The feature explorer: a local page that renders what the library computed."""
