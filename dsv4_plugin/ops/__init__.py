"""The ops: public functions, their checks, the one dispatch, and ``torch.ops.dsv4.*``.

Every op checks its arguments once (:mod:`dsv4_plugin.ops.checks`), takes the implementation that
:mod:`dsv4_plugin.ops.dispatch` chooses, and is registered as ``torch.ops.dsv4.*``
(:mod:`dsv4_plugin.ops.torch_library`) for ``torch.compile``; outside a compiler it calls the
implementation without the dispatcher.

**Memory.** An output shares memory with no other output and with no input: that is a ``ValueError``
before anything is written. Slices of one buffer that do not overlap are separate. Inputs may share
memory with each other.

**Tensors.** A subclass of a tensor is served as the plain tensor. A tensor on the meta device among
others is a ``ValueError``; with all tensors there an op gives the shape of its result.
"""
