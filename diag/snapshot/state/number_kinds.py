"""How arrays, tensors and generators of random numbers are kept and put back."""

from __future__ import annotations

import pickle
import random
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.state.kinds import Plain
from diag.snapshot.state.tensors import same_bits, version_of

LARGE_TENSOR = 1 << 14  # elements of a tensor (our choice) that is not compared after each pass


class Numbers(Plain):
    """A NumPy array."""

    def read(self) -> Any:
        return self.value.copy()

    def same(self) -> bool:
        now, saved = self.value, self.saved
        return now.shape == saved.shape and now.dtype == saved.dtype and now.tobytes() == saved.tobytes()

    def put_back(self) -> None:
        if self.value.shape != self.saved.shape:
            self.value.resize(self.saved.shape, refcheck=False)
        self.value[...] = self.saved


class TensorValue(Plain):
    """A tensor that is not a parameter or buffer of the model: its values, and the memory that they are in."""

    def read(self) -> Any:
        return self.value.detach().clone(), self.value.detach(), version_of(self.value)

    def same(self) -> bool:
        copy, alias, _ = self.saved
        return _memory(self.value) == _memory(alias) and same_bits(self.value, copy)

    def looks_the_same(self) -> bool:
        unwritten = version_of(self.value) == self.saved[2] and _memory(self.value) == _memory(self.saved[1])
        return unwritten if self.value.numel() > LARGE_TENSOR else self.same()

    def put_back(self) -> None:
        copy, alias, _ = self.saved
        with torch.no_grad(), torch.inference_mode(self.value.is_inference()):
            if _memory(self.value) != _memory(alias):
                self.value.data = alias
            if not same_bits(self.value, copy):
                self.value.copy_(copy)


def _memory(tensor: Tensor) -> Any:
    try:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype
    except RuntimeError:  # a sparse tensor has no such place
        return tuple(tensor.shape), tensor.dtype


class TensorVersion(Plain):
    """A tensor that is too large to be copied: only that it was written to can be seen."""

    def read(self) -> Any:
        return version_of(self.value), _memory(self.value)

    def put_back(self) -> None:
        raise TypeError("too large to be copied")


class Draws(Plain):
    """A generator of random numbers: of Python, of torch or of NumPy."""

    def read(self) -> Any:
        if isinstance(self.value, random.Random):
            return self.value.getstate()
        if isinstance(self.value, torch.Generator):
            return bytes(self.value.get_state().numpy())
        return pickle.dumps(_bits(self.value).state)

    def put_back(self) -> None:
        if isinstance(self.value, random.Random):
            self.value.setstate(self.saved)
        elif isinstance(self.value, torch.Generator):
            self.value.set_state(torch.tensor(list(self.saved), dtype=torch.uint8))
        else:
            _bits(self.value).state = pickle.loads(self.saved)


def _bits(value: Any) -> Any:
    """The bit generator of a numpy Generator or RandomState, or the bit generator itself."""
    return getattr(value, "bit_generator", None) or getattr(value, "_bit_generator", value)
