"""The ops: public functions, their checks, the one dispatch, and ``torch.ops.dsv4.*``.

Every op checks its arguments once (:mod:`dsv4_plugin.ops.checks`) and calls the implementation that
:mod:`dsv4_plugin.ops.dispatch` chooses. Every op is also registered as ``torch.ops.dsv4.*``
(:mod:`dsv4_plugin.ops.torch_library`) for ``torch.compile``. Outside a compiler an op calls its
implementation without torch's dispatcher.

**Memory.** An output must not share memory with another output or with an input. If it does, the op
raises ``ValueError`` before it writes anything. Slices of one buffer that do not overlap are
separate. Inputs may share memory with each other.

**Tensors.** An op treats a subclass of a tensor as the plain tensor. If some tensors are on the
meta device and others are not, the op raises ``ValueError``. If all are, it returns a meta tensor
of the result's shape.
"""
