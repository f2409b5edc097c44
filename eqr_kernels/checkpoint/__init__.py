"""Weights and model cards: official `.pth` files, `.safetensors`, shipped models and hub repositories.

Nothing in a file is ever executed.
"""

from eqr_kernels.checkpoint.card import ModelCard
from eqr_kernels.checkpoint.errors import MissingConfigError
from eqr_kernels.checkpoint.safetensors import MODEL_FILE, save_checkpoint
from eqr_kernels.checkpoint.sources import PRETRAINED, Checkpoint, available_models, load_checkpoint
from eqr_kernels.checkpoint.state_dict import expected_shapes

__all__ = [
    "MODEL_FILE",
    "PRETRAINED",
    "Checkpoint",
    "MissingConfigError",
    "ModelCard",
    "available_models",
    "expected_shapes",
    "load_checkpoint",
    "save_checkpoint",
]
