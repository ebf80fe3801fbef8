"""The sources of the scores: drawn at random, computed like the indexer's, or captured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv4_plugin.cli.shared.choices import RECALL_KINDS as KINDS
from dsv4_plugin.cli.shared.run import UsageError
from dsv4_plugin.kernels.reference import read_indexer_cache

__all__ = ["KINDS", "Scores", "captured", "drawn"]

HEADS, HEAD_DIM, PAGE = 64, 128, 64
E4M3_MAX = 448.0
_ELEMENTS = 1 << 24  # scores at a time; a batch has no more


@dataclass(frozen=True)
class Scores:
    """A batch of rows: float32 ``[rows, columns]``, and int32 ``[rows]``: columns per row."""

    scores: torch.Tensor
    lengths: torch.Tensor


def drawn(
    kind: str, rows: int, columns: int, *, seed: int = 0, device: str | torch.device = "cpu"
) -> Iterator[Scores]:
    """Yield batches of one of :data:`KINDS`, ``rows`` in all, every row full.

    ``relu_sum`` is the indexer's formula ``Σ_h w_h · ReLU(q_h · k_i)`` over 64 heads of 128 values,
    in float32. The keys are random, quantised to e4m3 with one power-of-two scale per key, and read
    back from a page-planar cache. The queries are random e4m3. The rows are queries over one
    context, like the steps of one request. With weights in (0, 1) the scores lie close together,
    far from zero. A model's weights come from a projection and have both signs, as in
    ``relu_sum_signed``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    g = torch.Generator(device=device).manual_seed(seed)
    keys = None if kind == "normal" else _keys(columns, g, device)
    step = max(1, _ELEMENTS // columns)
    for low in range(0, rows, step):
        count = min(step, rows - low)
        if keys is None:
            scores = torch.randn(count, columns, generator=g, device=device)
        else:
            scores = torch.stack([_row(keys, kind, g, device) for _ in range(count)])
        yield Scores(scores, torch.full((count,), columns, dtype=torch.int32, device=device))


def _keys(columns: int, g: torch.Generator, device: str | torch.device) -> torch.Tensor:
    """Return ``[columns, 128]`` float32 keys as the indexer's cache returns them."""
    pages = -(-columns // PAGE)
    cache = torch.empty(pages, PAGE * (HEAD_DIM + 4), dtype=torch.uint8, device=device)
    split = PAGE * HEAD_DIM
    wide = torch.randn(pages * PAGE, HEAD_DIM, generator=g, device=device)
    scale = torch.exp2(torch.ceil(torch.log2(wide.abs().amax(1, keepdim=True) / E4M3_MAX)))
    codes = (wide / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    cache[:, :split] = codes.view(pages, split)
    cache[:, split:] = scale.view(torch.uint8).view(pages, 4 * PAGE)
    keys = torch.empty(columns, HEAD_DIM, device=device)
    read_indexer_cache(cache, torch.arange(columns, device=device), keys, PAGE, HEAD_DIM)
    return keys


def _row(
    keys: torch.Tensor, kind: str, g: torch.Generator, device: str | torch.device
) -> torch.Tensor:
    draw = torch.rand if kind == "relu_sum" else torch.randn
    query = torch.randn(HEADS, HEAD_DIM, generator=g, device=device)
    query = query.to(torch.float8_e4m3fn).float()
    weights = draw(HEADS, generator=g, device=device)
    return weights @ torch.relu(query @ keys.T)


def captured(
    file: Path, *, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, int, list[Scores]]]:
    """Yield name, columns and batches of every tensor of scores in a ``.safetensors`` file.

    Scores are float32 ``[rows, columns]``. A tensor ``lengths`` (integer, ``[rows]``), or
    ``NAME.lengths`` for the tensor ``NAME``, has the number of columns that count; without it all
    count. Other tensors are an error, because the user could not see that they were ignored.

    Raises:
        UsageError: safetensors is not installed, or the file is not of this form.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise UsageError(
            "--scores needs safetensors, which is not installed: pip install safetensors"
        ) from error
    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} is no safetensors file: {error}") from error
    with opened as data:
        names = sorted(data.keys())
        scores = [n for n in names if n != "lengths" and not n.endswith(".lengths")]
        if not scores:
            raise UsageError(f"{file} has no tensor of scores; it has {names}")
        for name in scores:
            tensor = data.get_tensor(name)
            if tensor.dtype != torch.float32 or tensor.dim() != 2 or not tensor.numel():
                raise UsageError(
                    f"{file}: {name} must be float32 [rows, columns], got {tensor.dtype} "
                    f"{tuple(tensor.shape)}; what was rounded cannot be compared"
                )
            own = f"{name}.lengths" if f"{name}.lengths" in names else "lengths"
            lengths = data.get_tensor(own) if own in names else None
            yield name, tensor.shape[1], _batches(file, name, tensor, lengths, device)


def _batches(
    file: Path,
    name: str,
    tensor: torch.Tensor,
    lengths: torch.Tensor | None,
    device: str | torch.device,
) -> list[Scores]:
    rows, columns = tensor.shape
    if lengths is None:
        lengths = torch.full((rows,), columns)
    if lengths.dtype.is_floating_point or tuple(lengths.shape) != (rows,):
        raise UsageError(
            f"{file}: the lengths of {name} must be integers [{rows}], got {lengths.dtype} "
            f"{tuple(lengths.shape)}"
        )
    if int(lengths.min()) < 0 or int(lengths.max()) > columns:
        raise UsageError(
            f"{file}: the lengths of {name} must be 0 … {columns}, got {int(lengths.min())} … "
            f"{int(lengths.max())}"
        )
    inside = torch.arange(columns) < lengths[:, None]
    if bool((tensor.isnan() & inside).any()):
        raise UsageError(f"{file}: {name} has NaN inside its rows")
    step = max(1, _ELEMENTS // columns)
    return [
        Scores(tensor[i : i + step].to(device), lengths[i : i + step].to(device, torch.int32))
        for i in range(0, rows, step)
    ]
