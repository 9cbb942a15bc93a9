"""Depth rules: for each block of the child, which block of the parent it copies, and whether it is silent at first.

A rule is pure: two depths in, a tuple of :class:`Block` out. A *silent* block is a copy whose writes to the residual
stream (attention output and MLP output, with their biases) are zero: it passes everything through unchanged.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

from trainer.growth.errors import GrowthError
from trainer.growth.width import Operator


class Block(NamedTuple):
    source: int | None  # the parent's block; None: drawn at random
    silent: bool = False


class DepthRule(Protocol):
    @property
    def about(self) -> Operator: ...

    def refuse(self, parent: int, child: int) -> None:
        """Raise :class:`GrowthError` where this rule cannot lead from one depth to the other."""

    def blocks(self, parent: int, child: int) -> tuple[Block, ...]:
        """The child's blocks, lowest first. `child` is at least `parent`, and not refused."""


class AnyDepth:
    """What a rule is that leads to every depth."""

    def refuse(self, parent: int, child: int) -> None:
        """Any depth that is not smaller will do."""


class AtMostTwice:
    """What a rule is that runs each block twice at most."""

    about: ClassVar[Operator]

    def refuse(self, parent: int, child: int) -> None:
        if child > 2 * parent:
            raise GrowthError(
                "shape.n_layers",
                f"{self.about.key} runs no block of the parent's {parent} more than twice: {parent} to {2 * parent} "
                "would be right (stack takes any depth)",
                child,
            )


class Identity(AnyDepth):
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


class Stack(AnyDepth):
    """The whole stack again on top of itself: 0 1 2 0 1 2.

    Where the depth is no multiple, the last part is the *top* of the stack (4 to 6: 0 1 2 3 2 3), so that the last
    block stays the one that the output head knows. Up to twice the depth it is thereby the step of gradual stacking,
    a copy of the last blocks on top (Reddi et al. 2023). Not exact: the second pass transforms what the first wrote.
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


class Interleave(AnyDepth):
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


class Solar(AtMostTwice):
    """Two overlapping copies, the lower without its last m blocks, the upper without its first m (depth up-scaling).

        n blocks to s = 2 (n - m):   0 ... n-m-1  m ... n-1          n = 32, m = 8, s = 48 in the paper

    What is left out is what would have met in the middle, so the seam leaps back over n - 2 m blocks and not over all.
    Of an odd depth the lower copy keeps one block more. Not exact: the middle runs twice.
    """

    about: ClassVar[Operator] = Operator(
        "solar",
        "Overlapping copies",
        "Puts the upper blocks of one copy on the lower blocks of another: the function changes.",
        "Kim et al. 2023, SOLAR 10.7B: depth up-scaling",
        "https://arxiv.org/abs/2312.15166",
    )

    def blocks(self, parent: int, child: int) -> tuple[Block, ...]:
        upper = child // 2
        return tuple(map(Block, [*range(child - upper), *range(parent - upper, parent)]))


class Midas(AtMostTwice):
    """A copy of the middle right after itself: 0 1 2 to 0 1 1 2, one stage of middle gradual stacking.

    With b = child - parent new blocks, the parent is seen as groups of b blocks, and of k groups number ceil(k / 2) is
    copied; where b does not divide the depth, the b blocks in the middle are. From three groups on, the first and the
    last, which have parts of their own, stay single. With an odd number of groups the outcome is that of `solar`. Not
    exact: the middle runs twice.
    """

    about: ClassVar[Operator] = Operator(
        "midas",
        "Middle again",
        "Repeats a group of blocks in the middle right after itself: the function changes.",
        "Saunshi et al. 2024, On the Inductive Bias of Stacking (MIDAS)",
        "https://arxiv.org/abs/2409.19044",
    )

    def blocks(self, parent: int, child: int) -> tuple[Block, ...]:
        new = child - parent
        groups, rest = divmod(parent, new) if new else (1, 0)
        first = (parent - new) // 2 if rest else (groups - 1) // 2 * new
        return tuple(map(Block, [*range(first + new), *range(first, parent)]))


class AppendRandom(AnyDepth):
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
    rule.about.key: rule for rule in (Identity(), Stack(), Interleave(), Solar(), Midas(), AppendRandom())
}
