"""Changes without an effect that a test could see, by the mutant's key, and why; they are not tried."""

SPEED = "another way to the same number: it decides the time alone"
DEFAULT = "a default that no number depends on being this one"
MEMORY = "what is handed on at once or at the end: the numbers are the same, the memory is not"
SAFE = "the plan's own test sends the parameter to a slower method, which is right"

EQUIVALENT: dict[str, str] = {
    "diag/gradients/rules/call.py: if self.layout.axis >= values.ndim - 1: :: sign - -> +": SAFE,
    "diag/linalg/quadrature.py: steps: int = 80, :: constant 80 -> 160": DEFAULT,
    "diag/linalg/refine.py: seed: int = 0, :: constant 0 -> 1 #1": DEFAULT,
    "diag/linalg/quadrature.py: return 0.01 * float(measure.nodes.max() - measure.nodes.min()) or 1e-12"
    " :: constant 1e-12 -> 1e-13": "a spike in either case",
    "diag/gradients/capture.py: made = [t.grad_fn for t in output if isinstance(t, Tensor)"
    " and t.grad_fn is not None] :: boolean and -> or": "no node of the graph is None",
    "diag/gradients/rules/fallback.py: if call.layout.axis != 0 or call.layout.inner is not None:"
    " :: branch call.layout.axis != 0 or call.layout.inner is not None -> False": SAFE,
    "diag/gradients/rules/layout.py: if count > 1: :: branch count > 1 -> True": SPEED,
    "diag/gradients/coupling.py: for size in sorted({1, min(3, batch.size - 1)} - {0}):"
    " :: constant 3 -> 4": "three examples show what four do",
    "diag/gradients/rules/blocks.py: if pairs > 1 and pairs * (self.p + self.q) > self.p * self.q"
    " * (1 + self.steps / self.n): :: constant 1 -> 0": SPEED,
    'diag/gradients/rules/blocks.py: if size < LARGE_GRADIENT or self.groups > 1 or self.device.type != "cpu":'
    " :: boolean or -> and": SPEED,
    'diag/gradients/rules/convolution.py: if self.device.type != "cpu" or self.groups > 1:'
    " :: comparison > -> >=": SPEED,
    'diag/gradients/rules/norm_forms.py: if not is_argument(place, weight, "weight"):'
    ' :: branch not is_argument(place, weight, "weight") -> False #1': SAFE,
    "diag/gradients/rules/norm_forms.py: if call.layout != ExampleLayout(0) or delta.numel() < SMALL_NORM * call.n:"
    " :: boolean or -> and": SPEED,
    "diag/gradients/rules/convolution.py: parts = [self._settled(s, *self._pixel_sums(s)) for s in"
    " Block.slices(self, pixels**2 + 2 * square)] :: sign + -> -": SPEED,
    "diag/gradients/rules/convolution.py: if direct and by_pixel < min(full, by_patch):"
    " :: comparison < -> <=": SPEED,
    "diag/gradients/rules/blocks.py: if share * self.steps * (self.p + self.q) < self.p * self.q:"
    " :: sign * -> /": SPEED,
    "diag/gradients/rules/blocks.py: if self.groups > 1: :: branch self.groups > 1 -> True": SPEED,
    "diag/gradients/assembly.py: self._expected[name] -= 1 :: constant 1 -> 0": MEMORY,
    'diag/gradients/sources.py: lookup = name == "embedding" and (len(args) < 3 or args[2] < 0)'
    "  # rows of a table by constant numbers :: constant 3 -> 4": SAFE,
    'diag/gradients/capture.py: _saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks",'
    " lambda _: True) :: threshold True -> False": "for versions of torch that lack the function",
    "diag/gradients/planning.py: return max(norms, gram) <= allowed and error**0.5 <= slack * size**0.5"
    " + 1e-6 * total :: constant 1e-6 -> 1e-07": "a gradient of rounding alone lies far below either",
    "diag/run/arrays.py: partial.unlink(missing_ok=True) :: constant True -> False": "what it raises is silenced",
    "diag/run/checkpoints.py: if losses: :: branch losses -> True": SPEED,
    "diag/linalg/lanczos.py: self.next_look = 1 + max(min_products, which.count) if which else 4"
    " :: sign + -> -": SPEED,
    "diag/linalg/krylov.py: for _ in range(2): :: constant 2 -> 3": "two passes leave nothing for a third",
    "diag/watching/measure/findings.py: RESULTS_KEPT = 64  # results of an instrument that its course is judged by"
    " :: threshold 64 -> 128": DEFAULT,
    "diag/gradients/rules/convolution.py: if len(directions) > 2: :: comparison > -> <=": SPEED,
    "diag/gradients/rules/blocks.py: for part in group.split(max(1, 4 * SCRATCH // max(1, self.groups * "
    "self.steps * (self.p + self.q)))):"
    " :: sign * -> /": SPEED,
    "diag/gradients/rules/blocks.py: a, b = (a, b) if self.p > self.q else (b, a)  # long rows multiply faster"
    " :: comparison > -> <=": SPEED,
    "diag/gradients/queries.py: if gradients.num_batches == 1 or gradients.num_parameters <= room:"
    " :: comparison <= -> >": MEMORY,
    "diag/gradients/step.py: if not self._taken: :: branch not self._taken -> True": SPEED,
    "diag/watching/observe/capture.py: return loss if self.factor == 1 else self.factor * loss"
    " :: branch self.factor == 1 -> False": SPEED,
    "diag/run/growing.py: self.path.unlink(missing_ok=True)"
    " :: constant True -> False": "the file was made just before",
    "diag/gradients/rules/convolution.py: step = max(1, SCRATCH // 4 // self.size) :: sign // -> * #1": SPEED,
    "diag/watching/measure/measuring.py: open_ones = [a for a in accounts if a.due != inf and "
    "self._last.get(a.name, -1) < step] :: constant 1 -> 2": "no step is below 0",
    "diag/linalg/ritz.py: return int((ranked >= best - slack).sum()) - 1 >= count :: constant 1 -> 2": SPEED,
    "diag/linalg/resume.py: name = hashlib.blake2b(repr(sorted(identity.items())).encode(), digest_size=8)"
    ".hexdigest() :: constant 8 -> 9": DEFAULT,
    "diag/linalg/spectrum.py: max_products: int = 300, :: threshold 300 -> 600": DEFAULT,
    "diag/linalg/reductions.py: return blocks(v.numel(), v.device, ROWS_ON_CPU if basis.dtype == v.dtype else"
    " BLOCK_ON_CPU) :: branch basis.dtype == v.dtype -> True": SPEED,
    "diag/linalg/spectrum.py: return pair.subset(slice(0, 0)), 0 :: constant 0 -> 1": "empty from either end",
}
