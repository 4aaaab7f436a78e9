"""One file a view: it makes its components, and renders what the library computed."""
