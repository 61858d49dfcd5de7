"""What operations hold and move in memory, known without running them: from fake tensors."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside a ``with`` block, and still alive.

    To be entered inside a `FakeTensorMode`.

    Attributes:
        live: bytes alive now; goes on counting what is freed after the block.
        history: `live` after each tensor that was made.
        moved: bytes that the operations read and wrote; those that only make views move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.history: list[int] = []
        self.moved = 0
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._storages.update(tensor.untyped_storage() for tensor in given)  # made before the block, if not seen in it
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._add(tensor)
        if made and not func.is_view:
            self.moved += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in given + made}.values())
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._storages:
            self._storages.add(storage)
            self.live += storage.nbytes()
            self.history.append(self.live)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes
