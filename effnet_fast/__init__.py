"""effnet_fast: EfficientNets for PyTorch that train and run fast, in little memory."""

from effnet_fast.model import EfficientNet, create_model
from effnet_fast.scaling import VARIANTS, Scaling

__all__ = ["VARIANTS", "EfficientNet", "Scaling", "create_model"]
