"""Depth rules: for each block of the child, which block of the parent it copies, and whether it is silent at first.

A rule is pure: two depths in, a tuple of :class:`Block` out. A *silent* block is a copy whose writes to the residual
stream (attention output and MLP output, with their biases) are zero: it passes everything through unchanged.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

from trainer.growth.width import Operator


class Block(NamedTuple):
    source: int | None  # the parent's block; None: drawn at random
    silent: bool = False


class DepthRule(Protocol):
    @property
    def about(self) -> Operator: ...

    def blocks(self, parent: int, child: int) -> tuple[Block, ...]:
        """The child's blocks, lowest first. `child` is at least `parent`."""


class Identity:
    """Silent copies between the old blocks: block l' copies block floor(l' L / L'), all but the first copy silent.

    So each old block is followed by its silent copies (4 to 8: 0 0* 1 1* 2 2* 3 3*), which sets old blocks apart
    evenly. x + 0 = x, hence exact, bit for bit. Only the output matrices get a gradient at the first step, the rest
    wakes at the second; zeroing the norms instead would leave a gated MLP dead.
    """

    about: ClassVar[Operator] = Operator(
        "identity",
        "Identity blocks",
        "Puts a copy that writes nothing yet after each old block; the deeper model computes what the small one does.",
        "Wu et al. 2024, LLaMA Pro; Wang et al. 2023, LEMON (arXiv 2310.07999)",
        "https://arxiv.org/abs/2401.02415",
    )

    def blocks(self, parent: int, child: int) -> tuple[Block, ...]:
        sources = [at * parent // child for at in range(child)]
        return tuple(Block(source, silent=at > 0 and sources[at - 1] == source) for at, source in enumerate(sources))


class Stack:
    """The whole stack again on top of itself: 0 1 2 0 1 2.

    Where the depth is no multiple, the last part is the *top* of the stack (4 to 6: 0 1 2 3 2 3), so that the last
    block stays the one that the output head knows. Not exact: the second pass transforms what the first one wrote.
    """

    about: ClassVar[Operator] = Operator(
        "stack",
        "Stacking",
        "Repeats the whole stack of blocks: the function changes, but training recovers it fast and goes on well.",
        "Du et al. 2024, Stacking Your Transformers (G_stack); Gong et al. 2019, StackBERT",
        "https://arxiv.org/abs/2405.15319",
    )

    def blocks(self, parent: int, child: int) -> tuple[Block, ...]:
        whole, rest = divmod(child, parent)
        return tuple(map(Block, [*range(parent)] * whole + [*range(parent - rest, parent)]))


class Interleave:
    """Each block again right after itself: block l' copies block floor(l' L / L'), 0 0 1 1 2 2.

    A smaller jump of the loss than stacking, since neighbouring blocks do similar things; not exact either.
    """

    about: ClassVar[Operator] = Operator(
        "interleave",
        "Interleaving",
        "Repeats each block in place: the function changes, by less than stacking does.",
        "Chang et al. 2018, multi-level residual networks; Du et al. 2024 (arXiv 2405.15319)",
        "https://arxiv.org/abs/1710.10348",
    )

    def blocks(self, parent: int, child: int) -> tuple[Block, ...]:
        return tuple(Block(at * parent // child) for at in range(child))


class AppendRandom:
    """The original Kangaroo rule: the old blocks below, new ones on top with N(0, init_range), biases 0, gains 1."""

    about: ClassVar[Operator] = Operator(
        "append_random",
        "Random blocks on top",
        "Keeps the old blocks and adds randomly initialised ones above them: the function is disturbed.",
        "Kangaroo's original rule; compare G_random in Du et al. 2024, Stacking Your Transformers",
        "https://arxiv.org/abs/2405.15319",
    )

    def blocks(self, parent: int, child: int) -> tuple[Block, ...]:
        return tuple(Block(at if at < parent else None) for at in range(child))


DEPTH_RULES: dict[str, DepthRule] = {
    rule.about.key: rule for rule in (Identity(), Stack(), Interleave(), AppendRandom())
}
