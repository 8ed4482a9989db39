"""Rewrites of graphs that change their speed and nothing else.

A ReLU before max pooling moves behind it, where there are fewer elements: pooling picks the same
input, and where it picks one that is not positive no gradient passes in either order.

The optimiser's arithmetic is merged into the matrix products that make the gradients. A dense
layer's gradient is as large as its weight, and every pass over it costs about as much as the
product itself on a small batch. ONNX's Gemm adds to a matrix and scales it on the way:
``w - a @ b`` becomes ``Gemm(a, b, w, alpha=-1)`` and ``m * v + a @ b`` becomes
``Gemm(a, b, v, beta=m)``. Only the rounding of the results changes.

And a few operators less where each of them takes as long as its work: see `_simplify_view`.
"""

from typing import Any

import torch

aten = torch.ops.aten


def pool_first(graph: Any) -> None:
    """Move every ReLU that only feeds a max pooling behind it. graph: an exported module."""
    for pool in list(graph.graph.nodes):
        if pool.target is not aten.max_pool2d.default:
            continue
        relu = pool.args[0]
        if relu.target is aten.relu.default and _only_use(relu):
            with graph.graph.inserting_after(pool):
                after = graph.graph.call_function(aten.relu.default, (pool,))
            after.meta.update(relu.meta)
            pool.replace_all_uses_with(
                after, delete_user_cb=lambda user, new=after: user is not new
            )
            pool.replace_input_with(relu, relu.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def fuse(graph: Any) -> None:
    """Rewrite every update of a two-dimensional weight that the patterns fit."""
    for node in list(graph.graph.nodes):
        if node.target is aten.t.default and node.args[0].target is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
        elif node.target in _VIEWS:
            _simplify_view(node)
    graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        if node.target is aten.add.Tensor:
            _fuse_sum(graph.graph, node)
        elif node.target is aten.sub.Tensor:
            _fuse_descent(graph.graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


def _simplify_view(node: Any) -> None:
    """Leave the one side that depends on the batch to be inferred, instead of computing it; and
    let a sum drop its dimensions itself."""
    source, shape = node.args
    symbolic = [index for index, side in enumerate(shape) if isinstance(side, torch.fx.Node)]
    if len(symbolic) == 1 and -1 not in shape:
        node.args = source, [-1 if isinstance(side, torch.fx.Node) else side for side in shape]
    elif source.target is aten.sum.dim_IntList and _only_use(source) and len(source.args) == 3:
        summed, dims, _ = source.args
        sides = summed.meta["val"].shape
        dropped = {dim % len(sides) for dim in dims}
        if [side for dim, side in enumerate(sides) if dim not in dropped] == list(shape):
            source.args = summed, dims
            source.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(source)


def _fuse_sum(graph: Any, node: Any) -> None:
    """c + a @ b, where c may be a scaled matrix."""
    if node.kwargs or len(node.args) != 2:
        return
    for product, other in (node.args, node.args[::-1]):
        if not (_is_product(product) and _same_shape(other, product)):
            continue
        base, beta = other, 1.0
        if _only_use(other) and other.target is aten.mul.Tensor:
            scaled, factor = other.args
            if isinstance(factor, float):
                base, beta = scaled, factor
        with graph.inserting_before(node):
            fused = graph.call_function(
                aten.addmm.default, (base, *product.args), {"beta": beta, "alpha": 1.0}
            )
        _replace(node, fused)
        return


def _fuse_descent(graph: Any, node: Any) -> None:
    """c - a @ b, and c - (a @ b) * s for a scalar tensor s, which goes to the smaller factor, a."""
    if node.kwargs or len(node.args) != 2:
        return
    base, step = node.args
    if _is_product(step) and _same_shape(base, step):
        with graph.inserting_before(node):
            fused = graph.call_function(
                aten.addmm.default, (base, *step.args), {"beta": 1.0, "alpha": -1.0}
            )
        _replace(node, fused)
        return
    if not (isinstance(step, torch.fx.Node) and step.target is aten.mul.Tensor and _only_use(step)):
        return
    product, scale = step.args
    if not (_is_product(product) and _is_scalar(scale) and _same_shape(base, product)):
        return
    left, right = product.args
    with graph.inserting_before(node):
        scaled = graph.call_function(aten.mul.Tensor, (left, scale))
        fused = graph.call_function(
            aten.addmm.default, (base, scaled, right), {"beta": 1.0, "alpha": -1.0}
        )
    scaled.meta.update(left.meta)
    _replace(node, fused)


def _replace(node: Any, fused: Any) -> None:
    fused.meta.update(node.meta)
    node.replace_all_uses_with(fused)


def _is_product(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.target is aten.mm.default and _only_use(node)


def _only_use(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and len(node.users) == 1


def _is_scalar(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.meta["val"].dim() == 0


def _same_shape(one: Any, other: Any) -> bool:
    return isinstance(one, torch.fx.Node) and tuple(one.meta["val"].shape) == tuple(
        other.meta["val"].shape
    )
