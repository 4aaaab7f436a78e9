"""SAE training over many layers."""
