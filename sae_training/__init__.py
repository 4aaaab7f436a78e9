"""SAE training over many layers: residual activations from one forward pass, sae_lens objects out."""

from .config import SAEConfig
from .storage import load_saes, parse_layers, save_saes
from .train import train_saes

__all__ = ["SAEConfig", "load_saes", "parse_layers", "save_saes", "train_saes"]
