"""One word for one thing, no unfinished work, no print in the package, a docstring for all that is public."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.repo.sources import PACKAGE, RULES, FunctionNode, files_ending, repository_files, text_of, tree_of

# identifier -> what to write instead
BANNED_IDENTIFIERS = {
    **dict.fromkeys(["d_model", "model_dim", "hidden_dim", "embed_dim", "n_embd"], "hidden_size"),
    **dict.fromkeys(["d_ff", "ffn_dim", "ff_dim", "dim_ffn"], "ffn_hidden_size"),
    **dict.fromkeys(["gating_network", "gate_network", "router_gate", "gate_logits"], "router, or gate_proj in SwiGLU"),
    **dict.fromkeys(["balance_loss", "balancing_loss", "aux_coef", "lambda_"], "aux loss, moe_aux_loss_coeff"),
    **dict.fromkeys(["routing_mask", "expert_mask", "routing_weights", "router_weights"], "probs, routing_map"),
    **dict.fromkeys(["phase1", "phase2", "phase_1", "phase_2"], "stage 1, stage 2"),
    **dict.fromkeys(["translation_experts", "language_experts", "general_experts"], "lm_experts, mt_experts"),
}
INTERMEDIATE_SIZE = re.compile(r"\b(moe_)?intermediate_size\b")
INTERMEDIATE_SIZE_ALLOWED = (
    f"{PACKAGE}/hf/", f"{PACKAGE}/conversion/", f"{PACKAGE}/planning/conversion_benchmark.py",
    f"{PACKAGE}/integrations/fairseq2/",  # whose configuration is config.json's
)  # fmt: skip
BANNED_PHRASES = re.compile(r"\bd_model\b|\bbalance loss\b|\bgating network\b", re.IGNORECASE)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK|TBD)\b")


def identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the names that a file itself makes: variables, arguments, attributes assigned, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, FunctionNode | ast.ClassDef):
            yield node.name, node.lineno


def lines_matching(pattern: re.Pattern[str], names: list[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in names
        for number, line in enumerate((text_of(name) or "").splitlines(), start=1)
        if pattern.search(line)
    ]


def own_texts() -> list[str]:
    """Return the files that people of this project wrote: not the licences, the corpus or the rules themselves."""
    skipped = (RULES, "examples/data/", "LICENSE", "NOTICE", "constraints.txt")
    return [name for name in repository_files() if not name.startswith(skipped)]


def test_no_banned_identifier() -> None:
    found = [
        f"{name}:{line}: {word} (write {BANNED_IDENTIFIERS[word]})"
        for name in files_ending(".py")
        for word, line in identifiers(tree_of(name))
        if word in BANNED_IDENTIFIERS
    ]
    assert not found, "\n".join(found)


def test_no_banned_phrase() -> None:
    found = lines_matching(BANNED_PHRASES, own_texts())
    assert not found, "\n".join(found)


def test_intermediate_size_is_a_hugging_face_word() -> None:
    sources = files_ending(".py", below=f"{PACKAGE}/") + files_ending(".py", below="tools/")
    found = lines_matching(
        INTERMEDIATE_SIZE, [name for name in sources if not name.startswith(INTERMEDIATE_SIZE_ALLOWED)]
    )
    assert not found, "only in hf/ and conversion/:\n" + "\n".join(found)


def test_nothing_is_left_unfinished() -> None:
    found = lines_matching(UNFINISHED, own_texts())
    assert not found, "\n".join(found)


def test_the_package_does_not_print() -> None:
    """A print with an explicit file= (an error message on stderr) is deliberate and passes."""
    found = [
        f"{name}:{node.lineno}"
        for name in files_ending(".py", below=f"{PACKAGE}/")
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and not any(keyword.arg == "file" for keyword in node.keywords)
    ]
    assert not found, f"use logging: {found}"


def test_no_module_level_mutable_state() -> None:
    """A list, dict or set at module level is an UPPER_CASE constant; no function rebinds a global."""
    found = []
    for name in files_ending(".py", below=f"{PACKAGE}/"):
        found += [f"{name}:{node.lineno}: global" for node in ast.walk(tree_of(name)) if isinstance(node, ast.Global)]
        for node in tree_of(name).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(getattr(node, "value", None), ast.List | ast.Dict | ast.Set):
                words = [target.id for target in targets if isinstance(target, ast.Name)]
                found += [f"{name}:{node.lineno}: {word}" for word in words if not (word.isupper() or "__" in word)]
    assert not found, "\n".join(found)


def undocumented(node: ast.Module | ast.ClassDef | FunctionNode, label: str) -> Iterator[str]:
    """Yield the public symbols below a node, and the node itself, that have no docstring."""
    if not ast.get_docstring(node):
        yield label
    if isinstance(node, FunctionNode):
        return
    for child in node.body:
        if isinstance(child, FunctionNode | ast.ClassDef) and not child.name.startswith("_"):
            overload = any(ast.unparse(mark).endswith((".setter", "overload")) for mark in child.decorator_list)
            if not overload:
                yield from undocumented(child, f"{label}: {child.name}")


def test_every_public_symbol_has_a_docstring() -> None:
    sources = [name for name in files_ending(".py") if not name.startswith("tests/")]
    found = [label for name in sources for label in undocumented(tree_of(name), name)]
    assert not found, "\n".join(found)
