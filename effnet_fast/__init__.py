"""effnet_fast: EfficientNets for PyTorch that train and run fast, in little memory."""

from importlib.metadata import version

from effnet_fast.model import EfficientNet, create_model
from effnet_fast.scaling import VARIANTS, Scaling

__version__ = version("effnet_fast")

__all__ = ["VARIANTS", "EfficientNet", "Scaling", "__version__", "create_model"]
